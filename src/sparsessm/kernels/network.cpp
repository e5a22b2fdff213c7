// What the threads of a step share out, and the room they need: the same for every way to run a network.
#include "network.h"

#include <algorithm>

namespace sparsessm {

namespace {

// A part's matrices in the order of Step::shares; those that stand together are shared out alike.
std::vector<std::vector<const Matrix *>> matrices_of(const Part &part) {
    const auto all = [](const Linear &l) {
        std::vector<const Matrix *> found{l.matrix.get()};
        if (l.wide) found.push_back(l.wide.get());
        return found;
    };
    if (const auto *m = std::get_if<Mamba>(&part.what))
        return {{m->in_x.get()}, {m->in_z.get()}, {(m->heads ? m->heads->in_dt : m->x_proj).get()}, {m->out_proj.get()}};
    if (const auto *m = std::get_if<Delta>(&part.what)) {
        std::vector<std::vector<const Matrix *>> found;
        for (const auto &each : m->mixed) found.push_back({each.get()});
        for (const auto *each : {&m->gate, &m->step}) found.push_back({(each->narrow ? each->narrow : each->matrix).get()});
        found.push_back({m->beta.get()}), found.push_back(all(m->out));
        for (const auto *each : {&m->gate, &m->step})
            if (each->narrow) found.push_back({each->matrix.get()});
        return found;
    }
    if (const auto *a = std::get_if<Attention>(&part.what)) {
        std::vector<std::vector<const Matrix *>> found{all(a->q), all(a->k), all(a->v), all(a->o)};
        if (a->gate.matrix) found.push_back(all(a->gate));
        return found;
    }
    if (const auto *m = std::get_if<Latent>(&part.what)) {
        std::vector<std::vector<const Matrix *>> found{all(m->row), all(m->narrow.matrix ? m->narrow : m->q), all(m->o)};
        if (m->narrow.matrix) found.push_back(all(m->q));
        return found;
    }
    if (const auto *l = std::get_if<Linear>(&part.what)) return {all(*l)};
    const auto inner = [&all](const Mlp &m) {
        auto found = all(m.up);
        for (const Matrix *other : m.gate.matrix ? all(m.gate) : std::vector<const Matrix *>{}) found.push_back(other);
        return found;
    };
    if (const auto *m = std::get_if<Mlp>(&part.what)) return {inner(*m), all(m->down)};
    const auto &m = std::get<Experts>(part.what);
    std::vector<std::vector<const Matrix *>> found{all(m.router), {}, {}};
    for (const Mlp &one : m.each) {
        for (const Matrix *each : inner(one)) found[1].push_back(each);
        for (const Matrix *each : all(one.down)) found[2].push_back(each);
    }
    if (m.before.matrix) found.push_back(all(m.before)), found.push_back(all(m.behind));
    return found;
}

std::vector<int64_t> shared(const std::vector<const Matrix *> &together, int threads) {
    if (together.size() == 1) return together[0]->shares(threads);
    int64_t apart = 1; // groups that stay with one thread in all of them
    for (const Matrix *m : together) apart = std::max(apart, m->together());
    const int64_t groups = together[0]->groups, units = (groups + apart - 1) / apart;
    std::vector<int64_t> bounds;
    for (int t = 0; t <= threads; ++t) bounds.push_back(std::min(groups, units * t / threads * apart));
    return bounds;
}

// The most that any part needs of a workspace, for one sequence.
struct Room {
    int64_t wide = 0, between = 0, narrow = 0; // of Workspace: u and z; y; dbc
    bool embedded = false, side = false, given = false;

    void grow(const Part &part) {
        embedded = embedded || part.source == Source::both, side = side || part.beside;
        given = given || !part.after.empty();
        if (const auto *m = std::get_if<Mamba>(&part.what)) {
            wide = std::max({wide, m->in_x->rows, m->channels}), between = std::max(between, m->channels);
            narrow = std::max(narrow, m->heads ? m->heads->count : m->x_proj->rows);
        } else if (const auto *m = std::get_if<Delta>(&part.what)) {
            wide = std::max(wide, m->mixed_rows), between = std::max(between, m->heads * m->channels);
            narrow = std::max(narrow, m->step.matrix->rows + m->heads + m->gate.low() + m->step.low());
        } else if (const auto *a = std::get_if<Attention>(&part.what)) {
            wide = std::max({wide, (a->gate.matrix ? 2 : 1) * a->heads * a->width, 2 * a->shared * a->width});
            between = std::max(between, a->heads * a->width);
        } else if (const auto *m = std::get_if<Latent>(&part.what)) {
            wide = std::max({wide, m->q.matrix->rows, m->row.matrix->rows + (m->narrow.matrix ? m->narrow.matrix->rows : 0)});
            between = std::max(between, m->heads * m->width);
        } else if (const auto *m = std::get_if<Mlp>(&part.what)) {
            wide = std::max(wide, m->up.matrix->rows);
        } else if (const auto *e = std::get_if<Experts>(&part.what)) {
            wide = std::max(wide, e->chosen * e->each[0].up.matrix->rows);
            between = std::max(between, e->each[0].up.matrix->cols);
            narrow = std::max(narrow, static_cast<int64_t>(e->each.size()));
        }
    }
};

} // namespace

size_t shares_of(const Part &part) { return matrices_of(part).size(); }

std::vector<std::vector<int64_t>> shares_of(const Network &net, int threads) {
    std::vector<std::vector<int64_t>> found;
    for (const Part &part : net.parts)
        for (const auto &some : matrices_of(part)) found.push_back(shared(some, threads));
    found.push_back(net.head->shares(threads));
    return found;
}

void make_room(const Network &net, int64_t batch, Workspace &work) {
    Room room;
    for (const Part &part : net.parts) room.grow(part);
    work.hidden.resize(batch * net.width), work.u.resize(batch * room.wide), work.z.resize(batch * room.wide);
    work.y.resize(batch * room.between), work.dbc.resize(batch * room.narrow);
    work.embedded.resize(room.embedded ? batch * net.width : 0), work.side.resize(room.side ? batch * net.width : 0);
    work.given.resize(room.given ? batch * net.width : 0);
    work.turned.resize(batch * 2 * net.turns.size());
}

} // namespace sparsessm
