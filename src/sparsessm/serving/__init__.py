"""A server in front of the runtime: the OpenAI API for a model on this CPU. Needs the extra `serve`.

Place in the flow: above `runtime/`, which it asks for tokens; `sparsessm serve` starts it.

    running.py     the server: from the model to the end of the process
    settings.py    where and how a model is served
    api.py         routes, limits, errors
    gate.py        what stands before them: key, size, host
    bodies.py      what may be asked
    answers.py     how it is answered
    events.py      what is asked of the scheduler, and what it tells
    scheduler.py   requests join and leave a running batch
    prefixes.py    states of prompts that were read before
    watching.py    does the traffic look like the text that the model was pruned for?
    metrics.py     counts and times for Prometheus

Importing it is light.
"""
