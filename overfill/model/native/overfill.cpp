// The C interface of the native forward pass, which native/library.py declares. All code is one translation unit.
#include <algorithm>
#include <memory>
#include <new>

#include "plan.h"
#include "sampling.h"

using namespace ovf;

namespace {

enum Part { QKV, O, GATE_UP, DOWN, HEAD, TAIL_RIGHT, TAIL_LEFT };
enum Vector { INPUT_NORM, POST_NORM, QKV_BIAS, Q_NORM, K_NORM, O_BIAS, GATE_UP_BIAS, DOWN_BIAS, NORM };

size_t gate_up_rows(const OvfShape& s) { return (s.intermediate + 15) / 16 * PANEL; }

// Row of the checkpoint's [gate; up] that row i of the packed matrix holds; -1 for padding.
ptrdiff_t gate_up_row(const OvfShape& s, size_t i) {
    const size_t row = i / PANEL * 16 + i % 16;
    if (row >= static_cast<size_t>(s.intermediate)) return -1;
    return i % PANEL < 16 ? row : s.intermediate + row;
}

size_t matrix_bytes(const Matrix& m) {
    return Arena::rounded(m.panels() * m.panel_bytes()) + (m.int8 ? Arena::rounded(m.panels() * PANEL * sizeof(float)) : 0);
}

void allocate_matrix(Matrix& m, Arena& arena) {
    m.data = arena.allocate<char>(m.panels() * m.panel_bytes());
    m.scales = m.int8 ? arena.allocate<float>(m.panels() * PANEL) : nullptr;
}

template <class Visit>
void each_matrix(Model& m, Visit visit) {
    for (Layer& layer : m.layers)
        for (Matrix* matrix : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) visit(*matrix);
    for (Matrix* matrix : {&m.head, &m.tail_right, &m.tail_left}) visit(*matrix);
}

}  // namespace

extern "C" {

// Not 0 if this process may use AMX tiles.
int ovf_has_amx() { return has_amx(); }

// Creates a model without weights; returns null if memory does not suffice. The caller keeps `embedding` [vocab,
// hidden], `order` [vocab], `cos` and `sin` [max_positions, head_dim / 2] alive. Without `embedding`, steps read the
// head's rows.
void* ovf_create(const OvfShape* shape, const uint16_t* embedding, const int32_t* order, const float* cos,
                 const float* sin) {
    auto m = std::make_unique<Model>();
    m->shape = *shape;
    const auto& s = m->shape;
    m->attention = {static_cast<size_t>(s.heads), static_cast<size_t>(s.kv_heads), static_cast<size_t>(s.head_dim)};
    m->embedding = embedding, m->order = order, m->cos = cos, m->sin = sin;
    m->layers.resize(s.layers);
    const size_t hidden = s.hidden, attended = s.heads * s.head_dim, qkv = (s.heads + 2 * s.kv_heads) * s.head_dim;
    m->amx = s.amx && has_amx() && std::max({hidden, attended, static_cast<size_t>(s.intermediate)}) <= AMX_COLUMNS;
    for (Layer& layer : m->layers) {
        layer.qkv.rows = qkv, layer.qkv.cols = hidden;
        layer.o.rows = hidden, layer.o.cols = attended;
        layer.gate_up.rows = gate_up_rows(s), layer.gate_up.cols = hidden;
        layer.down.rows = hidden, layer.down.cols = s.intermediate;
    }
    m->head.rows = s.head_tokens, m->head.cols = hidden;
    m->tail_right.rows = s.tail_rank, m->tail_right.cols = hidden;
    m->tail_left.rows = s.vocab - s.head_tokens, m->tail_left.cols = s.tail_rank;
    size_t bytes = 0;
    each_matrix(*m, [&](Matrix& matrix) {
        matrix.int8 = m->quantised();
        bytes += matrix_bytes(matrix);
    });
    const size_t vectors = 5 * round_up(hidden, PANEL) + round_up(qkv, PANEL) + 2 * round_up(s.head_dim, 16) +
                           gate_up_rows(s);  // of a layer that has all of them
    bytes += (s.layers + 1) * (vectors * sizeof(float) + 8 * 64);
    try {
        m->arena = std::make_unique<Arena>(bytes);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
    each_matrix(*m, [&](Matrix& matrix) { allocate_matrix(matrix, *m->arena); });
    return m.release();
}

void ovf_destroy(void* handle) { delete static_cast<Model*>(handle); }

// Copies a matrix into the model: [rows, cols] bf16 or int8, as in LayerWeights. scales: [rows], int8 only.
void ovf_set_matrix(void* handle, int64_t index, int part, const void* data, const float* scales) {
    Model& m = *static_cast<Model*>(handle);
    Layer& layer = m.layers[index];
    Matrix* const parts[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down, &m.head, &m.tail_right, &m.tail_left};
    Matrix& matrix = *parts[part];
    const auto row_of = [&](size_t i) -> ptrdiff_t {
        if (part == GATE_UP) return gate_up_row(m.shape, i);
        return i < matrix.rows ? static_cast<ptrdiff_t>(i) : -1;
    };
    if (!m.quantised()) return pack(matrix, static_cast<const uint16_t*>(data), row_of);
    pack(matrix, static_cast<const int8_t*>(data), row_of);
    float* own = const_cast<float*>(matrix.scales);
    for (size_t i = 0; i < matrix.panels() * PANEL; ++i) own[i] = row_of(i) >= 0 ? scales[row_of(i)] : 0.0f;
}

// Copies the float32 weights of a norm, or a bias, into the model.
void ovf_set_vector(void* handle, int64_t index, int kind, const float* data, int64_t count) {
    Model& m = *static_cast<Model*>(handle);
    const bool interleaved = kind == GATE_UP_BIAS;
    const size_t padded = interleaved ? gate_up_rows(m.shape) : round_up(count, PANEL);
    float* out = m.arena->allocate<float>(padded);
    for (size_t i = 0; i < padded; ++i) {
        const ptrdiff_t from = interleaved ? gate_up_row(m.shape, i) : i < static_cast<size_t>(count) ? i : -1;
        out[i] = from >= 0 ? data[from] : 0.0f;
    }
    if (kind == NORM) {
        m.norm = out;
        return;
    }
    Layer& l = m.layers[index];
    float** const fields[] = {&l.input_norm, &l.post_norm, &l.qkv_bias, &l.q_norm, &l.k_norm, &l.o_bias, &l.gate_up_bias, &l.down_bias};
    *fields[kind] = out;
}

// Allocates slots for adapters up to `rank`; returns 0 if memory does not suffice. Called before the first step with one.
int ovf_allocate_adapters(void* handle, int64_t slots, int64_t rank) {
    Model& m = *static_cast<Model*>(handle);
    const OvfShape& s = m.shape;
    std::lock_guard<std::mutex> alone(m.busy);
    try {
        m.adapters.allocate(slots, rank, s.layers, s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim, s.intermediate);
    } catch (const std::bad_alloc&) {
        return 0;
    }
    m.work.tokens = 0;  // the next step allocates scratch that has room for adapters
    return 1;
}

// Empties a layer of a slot that no step uses.
void ovf_clear_adapter(void* handle, int64_t slot, int64_t layer) {
    static_cast<Model*>(handle)->adapters.clear(slot, layer);
}

// Copies a product into a slot that no step uses: down [rank, in] and up [out, rank], bf16. Projections are counted as
// in `PROJECTIONS`. Steps may run meanwhile.
void ovf_set_low_rank(void* handle, int64_t slot, int64_t layer, int64_t projection, int64_t rank, int64_t columns,
                      const uint16_t* down, const uint16_t* up) {
    static_cast<Model*>(handle)->adapters.set(slot, layer, projection, rank, columns, down, up);
}

// Runs one forward pass. Returns null on success, "" if the hook aborted it, otherwise what is wrong with the batch.
const char* ovf_forward(void* handle, const OvfBatch* batch, OvfHook hook) {
    Model& m = *static_cast<Model*>(handle);
    std::lock_guard<std::mutex> alone(m.busy);
    if (const char* fault = fault_of(m, *batch)) return fault;
    if (batch->tokens == 0) return nullptr;
    const int threads = static_cast<int>(batch->threads);
    try {
        allocate_scratch(m, batch->tokens, batch->num_logits, threads);
        plan_attention(m, *batch, threads);
        Step step(m, *batch, hook);
        step.plan_groups();
        m.pool.run(threads, step);
        return step.aborted() ? "" : nullptr;
    } catch (const std::bad_alloc&) {
        return "not enough memory for its scratch";
    }
}

// Draws a token for every row; OvfDraws describes input and output.
void ovf_draw(const OvfDraws* draws) {
    static std::mutex busy;
    static Pool* pool = new Pool;  // never deleted, because its threads may still run at exit
    std::atomic<size_t> next{0};
    auto job = [&](int, int) {
        static thread_local DrawScratch scratch;
        for (size_t row; (row = next++) < static_cast<size_t>(draws->rows);) draws->chosen[row] = draw(*draws, row, scratch);
    };
    std::lock_guard<std::mutex> alone(busy);
    pool->run(static_cast<int>(std::min(draws->threads, draws->rows)), job);
}
}
