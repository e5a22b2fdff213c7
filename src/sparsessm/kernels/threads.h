// parallel_for over independent units of work. Where torch has loaded an OpenMP runtime we borrow its pool (two pools
// would spin against each other); otherwise plain threads. Every unit's result is its own, so the number of threads
// never changes a bit of any result. A unit that fails (there is no memory) ends the work, and what it threw comes out
// here: it must not leave a thread's function, which would end the process. Included by scan_impl.h and few_bits.cpp, which
// bring the headers.

// `cost` is about the number of state updates in all: below some 20 microseconds of work threads do not pay.
template <typename Work> void parallel_for(int64_t units, int64_t cost, int threads, const Work &work) {
    if (cost < 50000) threads = 1;
    if (threads > units) threads = static_cast<int>(units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) work(unit);
        return;
    }
    struct Job {
        std::atomic<int64_t> next{0};
        int64_t units;
        const Work &work;
        std::atomic<bool> failed{false};
        std::exception_ptr failure{};
    } job{{0}, units, work};
    auto run = [](void *data) {
        auto &mine = *static_cast<Job *>(data);
        try {
            for (int64_t unit; (unit = mine.next.fetch_add(1)) < mine.units;) mine.work(unit);
        } catch (...) {
            if (!mine.failed.exchange(true)) mine.failure = std::current_exception();
            mine.next.store(mine.units); // nobody begins another
        }
    };
#if defined(__linux__)
    using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
    static const auto borrowed = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (borrowed) {
        borrowed(run, &job, static_cast<unsigned>(threads), 0);
        if (job.failure) std::rethrow_exception(job.failure);
        return;
    }
#endif
    std::vector<std::thread> pool;
    try {
        for (int i = 1; i < threads; ++i) pool.emplace_back(run, &job);
    } catch (...) { // no more threads: those that there are do the work
    }
    run(&job);
    for (auto &thread : pool) thread.join();
    if (job.failure) std::rethrow_exception(job.failure);
}
