// sparsessm.kernels._native: the parts of a network, as Python hands them over.
#include "native_network.h"
#include "network.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

namespace nb = nanobind;

namespace sparsessm {

namespace {

std::vector<float> floats(const nb::dict &from, const char *name, int64_t count, bool optional = false) {
    nb::object value = from.contains(name) ? from[name] : nb::none();
    if (value.is_none()) {
        if (optional) return {};
        refuse(std::string(name) + " is missing");
    }
    const auto array = nb::cast<Array<const float, 1>>(value);
    if (static_cast<int64_t>(array.shape(0)) != count)
        refuse(std::string(name) + " has " + std::to_string(array.shape(0)) + " values, expected " + std::to_string(count));
    return {array.data(), array.data() + count};
}

float number(const nb::dict &from, const char *name, float otherwise) {
    return from.contains(name) ? nb::cast<float>(from[name]) : otherwise;
}

int64_t whole(const nb::dict &from, const char *name) {
    if (!from.contains(name)) refuse(std::string(name) + " is missing");
    const auto value = nb::cast<int64_t>(from[name]);
    if (value < 1 || value > (int64_t{1} << 31)) refuse(std::string(name) + " is out of range");
    return value;
}

std::string word(const nb::dict &from, const char *name, const char *otherwise) {
    return from.contains(name) ? nb::cast<std::string>(from[name]) : otherwise;
}

std::shared_ptr<const Matrix> matrix(const nb::dict &from, const char *name) {
    if (!from.contains(name) || from[name].is_none()) refuse(std::string(name) + " is missing");
    return nb::cast<std::shared_ptr<Matrix>>(from[name]);
}

std::shared_ptr<const Matrix> matrix(const nb::dict &from, const char *name, int64_t rows, int64_t cols) {
    const auto m = matrix(from, name);
    if (m->rows != rows || m->cols != cols)
        refuse(std::string(name) + " is (" + std::to_string(m->rows) + ", " + std::to_string(m->cols) + "), expected (" +
               std::to_string(rows) + ", " + std::to_string(cols) + ")");
    return m;
}

// What every layer has; D channels go through the scan and `mixed` through the convolution.
Mamba outer(const nb::dict &from, const Network &net, int64_t D, int64_t mixed) {
    const int64_t d = net.width;
    Mamba l;
    l.channels = D;
    l.in_x = matrix(from, "in_x", mixed, d), l.in_z = matrix(from, "in_z", D, d);
    l.out_proj = matrix(from, "out_proj", d, D);
    l.conv = floats(from, "conv", net.taps * mixed);
    l.conv_bias = floats(from, "conv_bias", mixed, true);
    l.in_bias = floats(from, "in_bias", mixed + D, true), l.out_bias = floats(from, "out_bias", d, true);
    l.in_scale = number(from, "in_scale", 1), l.gate_scale = number(from, "gate_scale", 1);
    return l;
}

// A layer of Mamba-2, `shape` gives the sizes of its heads; what it says of them holds for all layers.
Mamba dual_layer(const nb::dict &from, const Network &net, const Heads &shape) {
    auto made = std::make_shared<Heads>(shape);
    Heads &m = *made;
    Mamba l = outer(from, net, net.channels, net.channels + 2 * m.groups * net.states);
    const int64_t padded = (m.count + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES; // enough for every level's lanes
    m.in_dt = matrix(from, "in_dt", m.count, net.width);
    m.dt_bias = floats(from, "dt_bias", padded), m.A = floats(from, "A", padded), m.skip = floats(from, "skip", padded);
    m.norm = floats(from, "gated_norm", net.channels, true);
    m.epsilon = number(from, "gated_epsilon", net.epsilon), m.step_scale = number(from, "step_scale", 1);
    m.gate_first = m.norm.empty() || !from.contains("norm_first") || !nb::cast<bool>(from["norm_first"]);
    if (!from.contains("keeps")) refuse("keeps is missing");
    const auto keeps = nb::cast<Array<const uint8_t, 1>>(from["keeps"]);
    if (static_cast<int64_t>(keeps.shape(0)) != m.count) refuse("keeps does not have one entry a head");
    m.directions = net.states;
    if (from.contains("B_projection") && !from.contains("directions")) refuse("directions is missing");
    if (from.contains("directions")) {
        m.directions = nb::cast<int64_t>(from["directions"]);
        if (m.directions < 1 || m.directions > net.states) refuse("directions must be between 1 and the number of states");
        const int64_t wide = (m.directions + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
        m.B_projection = floats(from, "B_projection", m.groups * net.states * wide);
        m.C_projection = floats(from, "C_projection", m.groups * net.states * wide);
    }
    for (int64_t h = 0; h < m.count; ++h) (keeps.data()[h] ? m.kept : m.memoryless).push_back(h);
    l.heads = std::move(made);
    return l;
}

Mamba layer(const nb::dict &from, const Network &net) {
    const int64_t D = matrix(from, "in_z")->rows; // all else is checked against it
    if (D > (int64_t{1} << 31)) refuse("in_z has a number of channels that is out of range");
    const int64_t padded = (D + SCAN_LANES - 1) / SCAN_LANES * SCAN_LANES;
    Mamba l = outer(from, net, D, D);
    l.x_proj = matrix(from, "x_proj", net.rank + 2 * net.states, D);
    l.dt_proj = matrix(from, "dt_proj", D, net.rank);
    l.dt_bias = floats(from, "dt_bias", padded), l.skip = floats(from, "skip", padded);
    l.readings = floats(from, "readings", net.rank + 2 * net.states, true);
    if (!l.readings.empty() && net.mixer_epsilon < 0) refuse("readings have weights, but no norm");
    for (const char *name : {"channel", "slots", "index"})
        if (!from.contains(name)) refuse(std::string(name) + " is missing");
    const auto channel = nb::cast<Array<const int32_t, 1>>(from["channel"]);
    if (static_cast<int64_t>(channel.shape(0)) != padded) refuse("channel does not have one entry a padded channel");
    std::vector<bool> seen(D, false);
    for (int64_t i = 0; i < padded; ++i) {
        const int32_t c = channel.data()[i];
        if (i < D ? (c < 0 || c >= D || seen[c]) : c != -1) refuse("channel is not an order of the channels");
        if (i < D) seen[c] = true;
        l.channel.push_back(c);
    }
    const auto slots = nb::cast<std::vector<int64_t>>(from["slots"]);
    if (static_cast<int64_t>(slots.size()) != padded / SCAN_LANES) refuse("slots does not have one entry a group");
    int64_t entries = 0;
    for (const int64_t count : slots) {
        if (count < 0 || count > net.states) refuse("a group has more slots than there are states");
        const int32_t *own = l.channel.data() + l.groups.size() * SCAN_LANES;
        bool consecutive = true;
        for (int lane = 0; lane < SCAN_LANES; ++lane) consecutive = consecutive && own[lane] == own[0] + lane;
        l.groups.push_back({entries, entries, static_cast<int32_t>(count), true, consecutive});
        entries += count * SCAN_LANES;
    }
    l.A = floats(from, "A", entries);
    const auto index = nb::cast<Array<const uint8_t, 1>>(from["index"]);
    if (static_cast<int64_t>(index.shape(0)) != entries) refuse("index does not have as many entries as A");
    l.index.assign(index.data(), index.data() + entries);
    for (const uint8_t n : l.index)
        if (n >= net.states) refuse("index names a state that does not exist");
    for (ScanGroup &group : l.groups) {
        group.ordered = group.slots == net.states || group.slots == 0;
        for (int64_t i = 0; i < int64_t{group.slots} * SCAN_LANES; ++i)
            group.ordered = group.ordered && l.index[group.entries + i] == i / SCAN_LANES;
    }
    l.index.resize(entries + SCAN_LANES);
    return l;
}

// A product of a part: {matrix, bias, scale, narrow, wide}.
Linear linear(const nb::dict &from, const char *name, int64_t rows, int64_t cols) {
    if (!from.contains(name) || from[name].is_none()) refuse(std::string(name) + " is missing");
    const auto fields = nb::cast<nb::dict>(from[name]);
    Linear l;
    l.matrix = matrix(fields, "matrix");
    if ((rows && l.matrix->rows != rows) || l.matrix->cols != cols)
        refuse(std::string(name) + " is (" + std::to_string(l.matrix->rows) + ", " + std::to_string(l.matrix->cols) +
               "), expected (" + (rows ? std::to_string(rows) : "any") + ", " + std::to_string(cols) + ")");
    l.bias = floats(fields, "bias", l.matrix->rows, true);
    l.scale = number(fields, "scale", 1);
    if (fields.contains("narrow")) {
        l.narrow = matrix(fields, "narrow"), l.wide = matrix(fields, "wide");
        if (l.narrow->cols != cols || l.wide->cols != l.narrow->rows || l.wide->rows != l.matrix->rows)
            refuse(std::string(name) + " has an adapter that does not fit it");
    }
    return l;
}

bool has(const nb::dict &from, const char *name) { return from.contains(name) && !from[name].is_none(); }

Attention attention(const nb::dict &from, const Network &net, int64_t reads) {
    Attention a;
    a.heads = whole(from, "heads"), a.shared = whole(from, "shared"), a.width = whole(from, "head_width");
    if (a.heads % a.shared) refuse("heads must be a multiple of shared");
    a.q = linear(from, "q", a.heads * a.width, reads), a.k = linear(from, "k", a.shared * a.width, reads);
    a.v = linear(from, "v", a.shared * a.width, reads), a.o = linear(from, "o", net.width, a.heads * a.width);
    a.scale = number(from, "score_scale", 1);
    if (has(from, "gate")) a.gate = linear(from, "gate", a.heads * a.width, reads);
    a.norm_whole = from.contains("norm_whole") && nb::cast<bool>(from["norm_whole"]);
    a.q_norm = floats(from, "q_norm", (a.norm_whole ? a.heads : 1) * a.width, true);
    a.k_norm = floats(from, "k_norm", (a.norm_whole ? a.shared : 1) * a.width, true);
    a.rotary = from.contains("rotary") && nb::cast<bool>(from["rotary"]);
    if (a.rotary && 2 * static_cast<int64_t>(net.turns.size()) > a.width) refuse("turns are more than half of a head");
    return a;
}

Latent latent(const nb::dict &from, const Network &net, int64_t reads) {
    Latent m;
    m.heads = whole(from, "heads"), m.rank = whole(from, "rank"), m.common = whole(from, "common");
    m.own = whole(from, "own"), m.width = whole(from, "head_width");
    m.row = linear(from, "row", m.rank + m.common, reads), m.o = linear(from, "o", net.width, m.heads * m.width);
    int64_t before = reads;
    if (has(from, "narrow")) {
        m.narrow = linear(from, "narrow", 0, reads), before = m.narrow.matrix->rows;
        m.q_norm = floats(from, "q_norm", before);
    }
    m.q = linear(from, "q", m.heads * (m.own + m.common), before);
    m.norm = floats(from, "row_norm", m.rank);
    m.scale = number(from, "score_scale", 1), m.epsilon = number(from, "row_epsilon", net.epsilon);
    const auto each = [&](const char *name, int64_t rows, int64_t cols) {
        if (!has(from, name)) refuse(std::string(name) + " is missing");
        std::vector<std::shared_ptr<const Matrix>> found;
        for (const auto &one : nb::cast<std::vector<std::shared_ptr<Matrix>>>(from[name])) {
            if (one->rows != rows || one->cols != cols) refuse("a matrix of " + std::string(name) + " does not fit a head");
            found.push_back(one);
        }
        if (static_cast<int64_t>(found.size()) != m.heads) refuse(std::string(name) + " does not have one matrix a head");
        return found;
    };
    m.keys = each("keys", m.rank, m.own), m.values = each("values", m.width, m.rank);
    return m;
}

Delta delta(const nb::dict &from, const Network &net) {
    Delta m;
    m.groups = whole(from, "groups"), m.keys = whole(from, "keys"), m.heads = whole(from, "heads");
    m.channels = whole(from, "head_width"), m.taps = whole(from, "taps");
    if (m.heads % m.groups) refuse("heads must be a multiple of groups");
    m.mixed_rows = 2 * m.groups * m.keys + m.heads * m.channels;
    if (!from.contains("mixed")) refuse("mixed is missing");
    int64_t rows = 0;
    for (const auto &each : nb::cast<std::vector<std::shared_ptr<Matrix>>>(from["mixed"])) {
        if (each->cols != net.width) refuse("a matrix of mixed does not read the stream");
        rows += each->rows;
        m.mixed.push_back(each);
    }
    if (rows != m.mixed_rows)
        refuse("mixed has " + std::to_string(rows) + " rows, expected " + std::to_string(m.mixed_rows));
    // A matrix that reads the stream, or what another makes of it.
    const auto behind = [&](const char *name, const char *before, int64_t rows) {
        Narrowed n;
        if (has(from, before)) n.narrow = matrix(from, before);
        if (n.narrow && n.narrow->cols != net.width) refuse(std::string(before) + " does not read the stream");
        n.matrix = matrix(from, name, rows, n.narrow ? n.low() : net.width);
        return n;
    };
    m.by_channel = from.contains("by_channel") && nb::cast<bool>(from["by_channel"]);
    m.sigmoid = from.contains("sigmoid") && nb::cast<bool>(from["sigmoid"]);
    m.gate = behind("gate", "gate_narrow", m.heads * m.channels);
    m.step = behind("step", "step_narrow", m.heads * (m.by_channel ? m.keys : 1));
    m.beta = matrix(from, "beta", m.heads, net.width);
    m.out = linear(from, "out", net.width, m.heads * m.channels);
    m.conv = floats(from, "conv", m.taps * m.mixed_rows);
    m.A = floats(from, "A", m.heads), m.dt_bias = floats(from, "dt_bias", m.step.matrix->rows);
    m.norm = floats(from, "head_norm", m.channels);
    m.epsilon = number(from, "head_epsilon", net.epsilon), m.most = number(from, "most", 1);
    if (!from.contains("keeps")) refuse("keeps is missing");
    const auto keeps = nb::cast<Array<const uint8_t, 1>>(from["keeps"]);
    if (static_cast<int64_t>(keeps.shape(0)) != m.heads) refuse("keeps does not have one entry a head");
    for (int64_t h = 0; h < m.heads; ++h) m.places.push_back(keeps.data()[h] ? m.kept++ : -1);
    return m;
}

Mlp mlp(const nb::dict &from, int64_t reads, int64_t gives) {
    Mlp m;
    m.up = linear(from, "up", 0, reads);
    const int64_t inner = m.up.matrix->rows;
    if (has(from, "gate")) m.gate = linear(from, "gate", inner, reads);
    m.down = linear(from, "down", gives, inner);
    if (has(from, "share")) m.share = linear(from, "share", 1, reads);
    const std::string curve = word(from, "curve", "");
    if (curve == "silu") m.curve = Curve::silu;
    else if (curve == "gelu") m.curve = Curve::gelu;
    else if (curve == "relu2") m.curve = Curve::relu2;
    else refuse("curve is '" + curve + "'; allowed: silu, gelu, relu2");
    return m;
}

Experts experts(const nb::dict &from, int64_t reads, int64_t gives) {
    Experts m;
    if (!has(from, "each")) refuse("each is missing");
    const auto each = nb::cast<std::vector<nb::dict>>(from["each"]);
    const auto many = static_cast<int64_t>(each.size());
    if (!many) refuse("there are no experts");
    m.router = linear(from, "router", many, reads);
    int64_t within = reads, without = gives;
    if (has(from, "before") != has(from, "behind")) refuse("before and behind come together");
    if (has(from, "before")) {
        m.before = linear(from, "before", 0, reads);
        within = without = m.before.matrix->rows;
        m.behind = linear(from, "behind", gives, within);
    }
    if (!m.before.matrix && reads != gives) refuse("experts read and give the same width");
    for (const nb::dict &one : each) {
        m.each.push_back(mlp(one, within, without));
        const Mlp &last = m.each.back(), &first = m.each.front();
        if (last.up.matrix->rows != first.up.matrix->rows || !last.gate.matrix != !first.gate.matrix)
            refuse("the experts differ in their sizes");
    }
    m.chosen = whole(from, "chosen");
    const std::string choice = word(from, "choice", "");
    if (choice == "softmax") m.choice = Choice::softmax;
    else if (choice == "softmax_of_chosen") m.choice = Choice::softmax_of_chosen;
    else if (choice == "sigmoid") m.choice = Choice::sigmoid;
    else refuse("choice is '" + choice + "'; allowed: softmax, softmax_of_chosen, sigmoid");
    int64_t open = many; // experts that can be chosen
    if (m.choice == Choice::sigmoid) {
        m.favour = floats(from, "favour", many);
        m.groups = whole(from, "groups"), m.chosen_groups = whole(from, "chosen_groups");
        if (many % m.groups || m.chosen_groups > m.groups) refuse("groups do not fit the experts");
        open = many / m.groups * m.chosen_groups;
        m.normalised = nb::cast<bool>(from["normalised"]), m.factor = number(from, "factor", 1);
    }
    if (m.chosen > open) refuse("chosen is " + std::to_string(m.chosen) + " of " + std::to_string(open) + " experts");
    return m;
}

Source source(const std::string &name) {
    if (name == "before") return Source::before;
    if (name == "stream") return Source::stream;
    if (name == "both") return Source::both;
    if (name == "side") return Source::side;
    if (name == "sum") return Source::sum;
    refuse("reads is '" + name + "'; allowed: before, stream, both, side, sum");
}

// Adds a mixer's state to the sequence's.
void place(Mamba &m, Network &net) {
    m.conv_state = net.state_size;
    m.scan_state = m.conv_state + (net.taps - 1) * m.in_x->rows;
    const Heads *heads = m.heads.get();
    const int64_t kept = heads ? static_cast<int64_t>(heads->kept.size()) * m.channels / heads->count * heads->directions
                               : static_cast<int64_t>(m.A.size());
    net.state_size = m.scan_state + kept;
    net.channels = std::max(net.channels, m.channels);
}

} // namespace

Network network(const nb::dict &sizes, const std::vector<nb::dict> &parts, const nb::dict &rest) {
    Network net{};
    const auto size = [&](const char *name) { return whole(sizes, name); };
    net.width = size("width"), net.states = size("states");
    net.taps = size("taps"), net.vocabulary = size("vocabulary");
    net.epsilon = nb::cast<float>(sizes["epsilon"]);
    net.mixer_epsilon = -1;
    Heads shape{};
    if (sizes.contains("heads")) { // Mamba-2
        net.channels = size("channels");
        shape.count = size("heads"), shape.groups = size("groups");
        shape.least = nb::cast<float>(sizes["least"]), shape.most = nb::cast<float>(sizes["most"]);
        if (net.channels % shape.count || shape.count % shape.groups)
            refuse("channels must be the same number for every head, and heads for every group");
    } else {
        net.rank = size("rank");
        if (net.states > 256) refuse("more than 256 states");
        if (sizes.contains("mixer_epsilon")) net.mixer_epsilon = nb::cast<float>(sizes["mixer_epsilon"]);
    }
    if (has(rest, "turns")) {
        const auto turns = nb::cast<Array<const float, 1>>(rest["turns"]);
        net.turns.assign(turns.data(), turns.data() + turns.shape(0));
        net.turned = number(rest, "turned", 1);
    }
    net.int8 = rest.contains("int8") && nb::cast<bool>(rest["int8"]);
    int64_t reads = 0;
    bool side = false;
    for (const nb::dict &fields : parts) {
        Part part;
        part.source = source(word(fields, "reads", "stream"));
        if (part.source == Source::before && !reads) refuse("the first part reads what a part before it read");
        if ((part.source == Source::side || part.source == Source::sum) && !side)
            refuse("a part reads what is beside the stream, and nothing is");
        if (part.source != Source::before) {
            reads = part.source == Source::both ? 2 * net.width : net.width;
            const bool plain = fields.contains("norm") && fields["norm"].is_none();
            if (!plain) part.norm = floats(fields, "norm", reads);
        }
        part.after = floats(fields, "after", net.width, true);
        part.beside = fields.contains("beside") && nb::cast<bool>(fields["beside"]);
        part.scale = number(fields, "scale", 1);
        if (part.beside && !part.after.empty()) refuse("what goes beside the stream has no norm");
        side = side || part.beside;
        const std::string kind = word(fields, "kind", "mamba");
        if (kind == "mamba") {
            if (reads != net.width) refuse("a mixer reads the stream alone");
            Mamba m = shape.count ? dual_layer(fields, net, shape) : layer(fields, net);
            place(m, net);
            part.what = std::move(m);
        } else if (kind == "delta") {
            if (reads != net.width) refuse("a mixer reads the stream alone");
            Delta m = delta(fields, net);
            m.conv_state = net.state_size;
            m.rule_state = m.conv_state + (m.taps - 1) * m.mixed_rows;
            net.state_size = m.rule_state + m.kept * m.keys * m.channels;
            part.what = std::move(m);
        } else if (kind == "attention") {
            Attention a = attention(fields, net, reads);
            a.place = net.block;
            net.block += a.floats(net.int8);
            part.what = std::move(a);
        } else if (kind == "latent") {
            Latent m = latent(fields, net, reads);
            m.place = net.block;
            net.block += m.floats(net.int8);
            part.what = std::move(m);
        } else if (kind == "mlp") {
            part.what = mlp(fields, reads, net.width);
        } else if (kind == "experts") {
            part.what = experts(fields, reads, net.width);
        } else if (kind == "linear") {
            part.what = linear(fields, "linear", net.width, reads);
        } else {
            refuse("kind is '" + kind + "'; allowed: mamba, delta, attention, latent, mlp, experts, linear");
        }
        net.parts.push_back(std::move(part));
    }
    size_t share = 0;
    for (Part &part : net.parts) part.share = share, share += shares_of(part);
    if (net.block) ++net.state_size; // how many tokens were seen
    net.norm = floats(rest, "norm", net.width);
    net.embedding = matrix(rest, "embedding", net.vocabulary, net.width);
    net.head = matrix(rest, "head", net.vocabulary, net.width);
    net.embedding_scale = number(rest, "embedding_scale", 1);
    return net;
}

} // namespace sparsessm
