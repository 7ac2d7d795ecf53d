// One forward pass, in phases that all threads run together. Between two barriers a thread computes its own rows
// (tokens), its own panels of a matrix, or the next work items of attention.
#pragma once
#include <optional>

#include "model.h"

namespace ovf {

constexpr int64_t AMX_MIN_TOKENS = 5;  // smaller steps wait for memory, so that AMX tiles do not help

class Step {
  public:
    Step(Model& model, const OvfBatch& batch, OvfHook hook)
        : m_(model),
          b_(batch),
          hook_(hook),
          w_(model.work),
          adapters_(batch.adapters),
          span_(batch.k_scales ? span_int8_function(model.attention) : span_function(model.attention)) {}

    bool aborted() const { return aborted_; }

    // Groups the rows that have an adapter. Called once, before the threads start.
    void plan_groups() {
        if (!adapters_) return;
        w_.groups.plan(b_.tokens, b_.threads, [&](size_t i) { return adapters_[i]; });
        w_.last_groups.plan(last_rows_.count, b_.threads, [&](size_t i) { return adapters_[last_rows_[i]]; });
    }

    void operator()(int thread, int threads) {
        const size_t first = b_.tokens * thread / threads, last = b_.tokens * (thread + 1) / threads;
        for (size_t row = first; row < last; ++row) embed(row);
        for (size_t i = 0; i < m_.layers.size(); ++i) {
            const Layer& layer = m_.layers[i];
            if (thread == 0) call_hook(i, 0);
            for (size_t row = first; row < last; ++row) normalise(row, row, layer.input_norm, w_.normed, w_.scales);
            shrink_operands(i, FUSED_QKV, w_.groups, w_.normed, w_.normed_stride, thread);
            m_.pool.barrier.wait();
            if (aborted_) return;
            project(layer, i, thread, threads);
            m_.pool.barrier.wait();
            const KvLayer kv = cache(i);
            for (size_t row = first; row < last; ++row) rotate(layer, kv, row);
            if (thread == 0) next_pack_ = 0, next_tile_ = 0, next_span_ = 0;
            m_.pool.barrier.wait();
            if (thread == 0) call_hook(i, 1);
            // After the last layer's keys and values, only the rows of requested logits matter.
            const Rows rows = i + 1 == m_.layers.size() ? last_rows_ : Rows{static_cast<size_t>(b_.tokens), nullptr};
            if (rows.count == 0) return;
            attend(kv, thread);
            m_.pool.barrier.wait();
            if (aborted_) return;
            finish_layer(layer, i, rows, thread, threads);
        }
        if (b_.num_logits) predict(thread, threads);
    }

  private:
    // Rows that a layer computes after attention: all, or those in a list.
    struct Rows {
        size_t count;
        const int64_t* list;

        size_t operator[](size_t i) const { return list ? list[i] : i; }
    };

    // Rows of requested logits; all rows if the list is not ascending, because it may then have a row twice.
    static Rows rows_behind_last(const OvfBatch& b) {
        for (int64_t i = 1; i < b.num_logits; ++i)
            if (b.logits_indices[i] <= b.logits_indices[i - 1]) return {static_cast<size_t>(b.tokens), nullptr};
        return {static_cast<size_t>(b.num_logits), b.logits_indices};
    }

    // Computes the output projection and the MLP. Operand i belongs to rows[i].
    void finish_layer(const Layer& layer, size_t index, const Rows& rows, int thread, int threads) {
        const Groups& groups = rows.list ? w_.last_groups : w_.groups;
        const size_t first = rows.count * thread / threads, last = rows.count * (thread + 1) / threads;
        for (size_t i = first; i < last; ++i) collect(rows[i], i);
        shrink_operands(index, FUSED_O, groups, w_.attended, w_.attended_stride, thread);
        m_.pool.barrier.wait();
        add_to_hidden(layer.o, layer.o_bias, index, FUSED_O, w_.attended, w_.attended_stride, rows, thread, threads);
        m_.pool.barrier.wait();
        for (size_t i = first; i < last; ++i) normalise(rows[i], i, layer.post_norm, w_.normed, w_.scales);
        shrink_operands(index, FUSED_GATE_UP, groups, w_.normed, w_.normed_stride, thread);
        m_.pool.barrier.wait();
        gate(layer, index, rows, thread, threads);
        m_.pool.barrier.wait();
        if (m_.quantised()) {
            for (size_t i = first; i < last; ++i)
                store(w_.gated_wide + i * m_.shape.intermediate, m_.shape.intermediate, i, w_.gated + i * w_.gated_stride,
                      w_.scales);
        }
        shrink_operands(index, FUSED_DOWN, groups, w_.gated, w_.gated_stride, thread);
        if (adapters_ || m_.quantised()) m_.pool.barrier.wait();
        add_to_hidden(layer.down, layer.down_bias, index, FUSED_DOWN, w_.gated, w_.gated_stride, rows, thread, threads);
        m_.pool.barrier.wait();
    }

    // Stores x [n] as row `to` of an operand, and of the operands of a quantised model's adapters.
    void store(const float* x, size_t n, size_t to, uint16_t* out, float* scales) {
        store_operand(x, n, operand_, out, scales + to);
        if (adapters_ && m_.quantised()) store_operand(x, n, Operand::BF16, w_.plain + to * w_.plain_stride, nullptr);
    }

    // Multiplies the operands of a matrix that this thread has stored by `down` of their adapters.
    void shrink_operands(size_t layer, Fused fused, const Groups& groups, const uint16_t* x, size_t stride, int thread) {
        if (!adapters_) return;
        if (m_.quantised()) x = w_.plain, stride = w_.plain_stride;
        shrink(m_.adapters, layer, fused, groups, x, stride, w_.shrunk, w_.shrunk_stride, thread);
    }

    // Adds the adapter's product of row `row`, which is operand `i`, to a panel of a matrix' product.
    inline __attribute__((always_inline)) void add_adapter(size_t layer, Fused fused, size_t row, size_t i, size_t p,
                                                           __m512& low, __m512& high) const {
        if (!adapters_ || adapters_[row] < 0) return;
        alignas(64) float sums[PANEL];
        _mm512_store_ps(sums, low), _mm512_store_ps(sums + 16, high);
        expand(m_.adapters, layer, fused, adapters_[row], w_.shrunk + i * w_.shrunk_stride, p, sums);
        low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
    }

    void call_hook(size_t layer, int64_t written) {
        if (hook_ && !aborted_ && hook_(layer, written)) aborted_ = true;
    }

    KvLayer cache(size_t layer) const {
        const size_t vectors = layer * b_.slots_in_cache * m_.attention.kv_heads, at = vectors * m_.attention.dim;
        KvLayer kv{};
        kv.block_size = b_.block_size, kv.row = m_.attention.kv_heads * m_.attention.dim;
        if (b_.k_scales) {
            kv.k_codes = static_cast<int8_t*>(b_.k_cache) + at, kv.v_codes = static_cast<int8_t*>(b_.v_cache) + at;
            kv.k_scales = b_.k_scales + vectors, kv.v_scales = b_.v_scales + vectors;
        } else {
            kv.k = static_cast<bf16*>(b_.k_cache) + at, kv.v = static_cast<bf16*>(b_.v_cache) + at;
        }
        return kv;
    }

    void embed(size_t row) {
        const int64_t token = b_.token_ids[row];
        float* out = w_.hidden + row * w_.hidden_stride;
        const size_t hidden = m_.shape.hidden;
        if (m_.embedding) {
            for (size_t i = 0; i < hidden; ++i) out[i] = to_float(m_.embedding[token * hidden + i]);
            return;
        }
        const bf16* panel = reinterpret_cast<const bf16*>(m_.head.panel(token / PANEL)) + token % PANEL * 2;
        for (size_t i = 0; i < hidden; ++i) out[i] = to_float(panel[i / 2 * 2 * PANEL + i % 2]);
    }

    // Stores the RMSNorm of a token's hidden state as row `to` of an operand.
    void normalise(size_t row, size_t to, const float* weight, uint16_t* out, float* scales) {
        const float* x = w_.hidden + row * w_.hidden_stride;
        const size_t n = m_.shape.hidden;
        __m512 squares = _mm512_setzero_ps();
        for (size_t i = 0; i < n; i += 16) {
            const __m512 v = _mm512_maskz_loadu_ps(lanes(n - i), x + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(n);
        const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + static_cast<float>(m_.shape.norm_eps)));
        float* normed = w_.qkv + to * w_.qkv_stride;  // free in all phases that normalise
        for (size_t i = 0; i < n; i += 16) {
            const __mmask16 mask = lanes(n - i);
            const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
            _mm512_mask_storeu_ps(normed + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
        }
        store(normed, n, to, out + to * w_.normed_stride, scales);
    }

    void project(const Layer& layer, size_t index, int thread, int threads) {
        const size_t rows = layer.qkv.rows;
        const float* bias = layer.qkv_bias;
        multiply(layer.qkv, {w_.normed, w_.scales, w_.normed_stride, amx_}, b_.tokens, thread, threads,
                 [&](size_t row, size_t p, __m512 low, __m512 high) {
                     if (bias) {
                         low = _mm512_add_ps(low, _mm512_loadu_ps(bias + p * PANEL));
                         high = _mm512_add_ps(high, _mm512_loadu_ps(bias + p * PANEL + 16));
                     }
                     add_adapter(index, FUSED_QKV, row, row, p, low, high);
                     store(w_.qkv + row * w_.qkv_stride, rows, p, low, high);
                 });
    }

    static void store(float* row, size_t n, size_t p, __m512 low, __m512 high) {
        const size_t start = p * PANEL;
        _mm512_mask_storeu_ps(row + start, lanes(n - start), low);
        if (n > start + 16) _mm512_mask_storeu_ps(row + start + 16, lanes(n - start - 16), high);
    }

    // Normalises and rotates a row's queries and keys, and writes its keys and values to the cache.
    void rotate(const Layer& layer, const KvLayer& kv, size_t row) {
        const AttentionShape& s = m_.attention;
        const size_t dim = s.dim, half = dim / 2;
        float* x = w_.qkv + row * w_.qkv_stride;
        const float *cos = m_.cos + b_.positions[row] * half, *sin = m_.sin + b_.positions[row] * half;
        const size_t slot = b_.slots[row] * kv.row, scale = b_.slots[row] * s.kv_heads;
        for (size_t h = 0; h < s.heads + s.kv_heads; ++h) {
            const bool query = h < s.heads;
            float* head = x + h * dim;
            if (const float* weight = query ? layer.q_norm : layer.k_norm) norm_head(head, weight);
            const bool coded = !query && kv.coded();
            bf16* out = coded ? nullptr
                        : query ? w_.q + (row * s.heads + h) * s.padded() : kv.k + slot + (h - s.heads) * dim;
            for (size_t i = 0; i < half; i += 16) {
                const __mmask16 mask = lanes(half - i);
                const __m512 a = _mm512_maskz_loadu_ps(mask, head + i), b = _mm512_maskz_loadu_ps(mask, head + half + i);
                const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), d = _mm512_maskz_loadu_ps(mask, sin + i);
                const __m512 first = _mm512_fnmadd_ps(b, d, _mm512_mul_ps(a, c));
                const __m512 second = _mm512_fmadd_ps(a, d, _mm512_mul_ps(b, c));
                if (coded) {
                    _mm512_mask_storeu_ps(head + i, mask, first), _mm512_mask_storeu_ps(head + half + i, mask, second);
                    continue;
                }
                _mm256_mask_storeu_epi16(out + i, mask, narrow(first));
                _mm256_mask_storeu_epi16(out + half + i, mask, narrow(second));
            }
            if (coded) {
                const size_t k = h - s.heads;
                store_codes(head, dim, kv.k_codes + slot + k * dim, kv.k_scales + scale + k);
            }
        }
        const float* v = x + (s.heads + s.kv_heads) * dim;
        if (kv.coded()) {
            for (size_t h = 0; h < s.kv_heads; ++h)
                store_codes(v + h * dim, dim, kv.v_codes + slot + h * dim, kv.v_scales + scale + h);
            return;
        }
        for (size_t i = 0; i < kv.row; i += 16) {
            const __mmask16 mask = lanes(kv.row - i);
            _mm256_mask_storeu_epi16(kv.v + slot + i, mask, narrow(_mm512_maskz_loadu_ps(mask, v + i)));
        }
    }

    void norm_head(float* x, const float* weight) {
        const size_t n = m_.attention.dim;
        float squares = 0;
        for (size_t i = 0; i < n; ++i) squares += x[i] * x[i];
        const float factor = 1.0f / __builtin_sqrtf(squares / n + static_cast<float>(m_.shape.norm_eps));
        for (size_t i = 0; i < n; ++i) x[i] *= factor * weight[i];
    }

    void attend_spans(const KvLayer& kv, int thread) {
        const AttentionShape& s = m_.attention;
        const bool in_tiles = m_.amx && !kv.coded() && spans_fit_amx(s);
        std::optional<AmxScope> tiles;
        if (in_tiles) tiles.emplace();
        for (size_t i; (i = next_span_++) < w_.spans.size();) {
            const SpanItem& item = w_.spans[i];
            const bf16* q = w_.q + item.row * s.heads * s.padded();
            float* partial = w_.partials + item.partial * s.heads * s.partial();
            if (in_tiles)
                attend_span_amx(s, kv, table(item.sequence), q, item.first, item.last, partial, w_.span_scratch[thread]);
            else
                span_(s, kv, table(item.sequence), q, item.first, item.last, partial);
        }
    }

    void attend(const KvLayer& kv, int thread) {
        const AttentionShape& s = m_.attention;
        attend_spans(kv, thread);
        if (w_.tile_items.empty()) return;
        for (size_t i; (i = next_pack_++) < w_.pack_items.size();) {
            const TileItem& item = w_.pack_items[i];
            const size_t context = b_.context_lens[item.sequence], tokens = round_up(context, 32);
            bf16 *keys, *values;
            packed(item, tokens, &keys, &values);
            for (size_t t = item.first; t < item.first + item.count; t += 32)
                pack_keys_values(s, kv, table(item.sequence), item.kv_head, t, context, tokens, keys, values);
        }
        m_.pool.barrier.wait();
        std::optional<AmxScope> tiles;
        if (amx_) tiles.emplace();
        for (size_t i; (i = next_tile_++) < w_.tile_items.size();) {
            const TileItem& item = w_.tile_items[i];
            const size_t tokens = round_up(b_.context_lens[item.sequence], 32);
            bf16 *keys, *values;
            packed(item, tokens, &keys, &values);
            attend_tile(s, w_.q + item.row * s.heads * s.padded(), item.count, item.kv_head, item.seen, keys, values,
                        tokens, amx_, w_.tiles[thread], w_.attention + item.row * s.heads * s.dim);
        }
    }

    const int64_t* table(size_t sequence) const { return b_.table(sequence); }

    void packed(const TileItem& item, size_t tokens, bf16** keys, bf16** values) {
        const AttentionShape& s = m_.attention;
        const size_t both = packed_keys(s, tokens) + packed_values(s, tokens);
        *keys = w_.packed + w_.packed_at[item.sequence] + item.kv_head * both;
        *values = *keys + packed_keys(s, tokens);
    }

    // Stores a row's attention, after joining its spans, as row `to` of the output projection's operand.
    void collect(size_t row, size_t to) {
        const AttentionShape& s = m_.attention;
        const size_t n = s.heads * s.dim, start = w_.span_start[row], count = w_.span_start[row + 1] - start;
        float* x = w_.attention + row * n;
        if (count) join_spans(s, w_.partials + start * s.heads * s.partial(), count, x);
        store(x, n, to, w_.attended + to * w_.attended_stride, w_.scales);
    }

    void add_to_hidden(const Matrix& matrix, const float* bias, size_t index, Fused fused, const uint16_t* data,
                       size_t stride, const Rows& rows, int thread, int threads) {
        multiply(matrix, {data, w_.scales, stride, amx_}, rows.count, thread, threads,
                 [&](size_t i, size_t p, __m512 low, __m512 high) {
                     float* out = w_.hidden + rows[i] * w_.hidden_stride + p * PANEL;  // rows hold whole panels
                     if (bias) {
                         low = _mm512_add_ps(low, _mm512_loadu_ps(bias + p * PANEL));
                         high = _mm512_add_ps(high, _mm512_loadu_ps(bias + p * PANEL + 16));
                     }
                     add_adapter(index, fused, rows[i], i, p, low, high);
                     _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), low));
                     _mm512_storeu_ps(out + 16, _mm512_add_ps(_mm512_loadu_ps(out + 16), high));
                 });
    }

    // Computes silu(gate) * up. A panel has sixteen rows of gate, then sixteen of up.
    void gate(const Layer& layer, size_t index, const Rows& rows, int thread, int threads) {
        const size_t n = m_.shape.intermediate;
        const float* bias = layer.gate_up_bias;
        const bool wide = m_.quantised();
        multiply(layer.gate_up, {w_.normed, w_.scales, w_.normed_stride, amx_}, rows.count, thread, threads,
                 [&](size_t row, size_t p, __m512 gate, __m512 up) {
                     if (bias) {
                         gate = _mm512_add_ps(gate, _mm512_loadu_ps(bias + p * PANEL));
                         up = _mm512_add_ps(up, _mm512_loadu_ps(bias + p * PANEL + 16));
                     }
                     add_adapter(index, FUSED_GATE_UP, rows[row], row, p, gate, up);
                     const __m512 one = _mm512_set1_ps(1.0f), product = _mm512_mul_ps(gate, up);
                     __m512 x;
                     if (wide)
                         x = _mm512_div_ps(product, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
                     else  // half the time, with an error of 2e-4, a tenth of the rounding error of bfloat16
                         x = _mm512_mul_ps(product, _mm512_rcp14_ps(_mm512_add_ps(
                                                        one, exp2_coarse(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f))))));
                     if (wide)
                         _mm512_mask_storeu_ps(w_.gated_wide + row * n + p * 16, lanes(n - p * 16), x);
                     else  // if n is odd, also stores the zero that completes the last pair
                         _mm256_mask_storeu_epi16(w_.gated + row * w_.gated_stride + p * 16,
                                                  lanes(round_up(n - p * 16, 2)), narrow(x));
                 });
    }

    void predict(int thread, int threads) {
        const size_t num_logits = b_.num_logits;
        const size_t first = num_logits * thread / threads, last = num_logits * (thread + 1) / threads;
        m_.pool.barrier.wait();
        for (size_t i = first; i < last; ++i) normalise(b_.logits_indices[i], i, m_.norm, w_.last, w_.logit_scales);
        __m512* best = w_.best + thread * num_logits;
        __m512i* ids = w_.best_ids + thread * num_logits;
        uint8_t* broken = w_.broken + thread * num_logits;
        for (size_t i = 0; i < num_logits; ++i) {
            best[i] = _mm512_set1_ps(-__builtin_inff()), ids[i] = _mm512_setzero_si512(), broken[i] = 0;
        }
        m_.pool.barrier.wait();
        const Activations x{w_.last, w_.logit_scales, w_.normed_stride, amx_};
        multiply(m_.head, x, num_logits, thread, threads, [&](size_t i, size_t p, __m512 low, __m512 high) {
            collect_logits(i, p, low, high, 0, m_.head.rows, best, ids, broken);
        });
        if (m_.tail_left.rows) {
            const size_t rank = m_.tail_right.rows;
            multiply(m_.tail_right, x, num_logits, thread, threads, [&](size_t i, size_t p, __m512 low, __m512 high) {
                store(w_.qkv + i * w_.qkv_stride, rank, p, low, high);
            });
            m_.pool.barrier.wait();
            for (size_t i = first; i < last; ++i)
                store_operand(w_.qkv + i * w_.qkv_stride, rank, operand_, w_.normed + i * w_.normed_stride,
                              w_.scales + i);
            m_.pool.barrier.wait();
            multiply(m_.tail_left, {w_.normed, w_.scales, w_.normed_stride, amx_}, num_logits, thread, threads,
                     [&](size_t i, size_t p, __m512 low, __m512 high) {
                         collect_logits(i, p, low, high, m_.head.rows, m_.shape.vocab, best, ids, broken);
                     });
        }
        if (!b_.best) return;
        m_.pool.barrier.wait();
        for (size_t i = first; i < last; ++i) b_.best[i] = choose(i, threads);
    }

    // Stores panel `p` of the logits of request `i`, for rows `from` to `end` of the head and its tail, and updates
    // `best`.
    inline __attribute__((always_inline)) void collect_logits(size_t i, size_t p, __m512 low, __m512 high, size_t from,
                                                           size_t end, __m512* best, __m512i* ids, uint8_t* broken) {
        float* logits = b_.logits ? b_.logits + i * m_.shape.vocab : nullptr;
        if (logits && !m_.order) store(logits + from, end - from, p, low, high);
        if (!b_.best && !m_.order) return;
        const __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (size_t half = 0; half < 2; ++half) {
            const size_t start = from + p * PANEL + 16 * half;
            if (start >= end) break;
            const __m512 x = half ? high : low;
            const __mmask16 real = lanes(end - start);
            const __m512i tokens = m_.order ? _mm512_maskz_loadu_epi32(real, m_.order + start)
                                            : _mm512_add_epi32(counting, _mm512_set1_epi32(start));
            if (logits && m_.order) _mm512_mask_i32scatter_ps(logits, real, tokens, x, sizeof(float));
            if (!b_.best) continue;
            broken[i] |= _mm512_mask_cmp_ps_mask(real, x, x, _CMP_UNORD_Q) != 0;
            __mmask16 more = _mm512_mask_cmp_ps_mask(real, x, best[i], _CMP_GT_OQ);
            if (m_.order)  // among equals the lowest id wins, which may come last in this order
                more |= _mm512_mask_cmplt_epi32_mask(_mm512_mask_cmp_ps_mask(real, x, best[i], _CMP_EQ_OQ), tokens, ids[i]);
            best[i] = _mm512_mask_mov_ps(best[i], more, x);
            ids[i] = _mm512_mask_mov_epi32(ids[i], more, tokens);
        }
    }

    // The most likely token of a row, among equals the lowest id; -1 if a logit is NaN or the largest is infinite.
    int64_t choose(size_t i, int threads) const {
        const size_t num_logits = b_.num_logits;
        float top = -__builtin_inff();
        int64_t id = -1;
        for (int t = 0; t < threads; ++t) {
            if (w_.broken[t * num_logits + i]) return -1;
            alignas(64) float values[16];
            alignas(64) int32_t ids[16];
            _mm512_store_ps(values, w_.best[t * num_logits + i]);
            _mm512_store_si512(ids, w_.best_ids[t * num_logits + i]);
            for (int j = 0; j < 16; ++j)
                if (values[j] > top || (values[j] == top && id >= 0 && ids[j] < id)) top = values[j], id = ids[j];
        }
        return top < __builtin_inff() ? id : -1;
    }

    Model& m_;
    const OvfBatch& b_;
    const Rows last_rows_ = rows_behind_last(b_);
    OvfHook hook_;
    Workspace& w_;
    const int64_t* adapters_;  // [tokens], slot or -1; null if no token has an adapter
    SpanFunction span_;
    // The same for all products of a step, so that the choice of requested rows does not change the results' bits.
    const bool amx_ = m_.amx && b_.tokens >= AMX_MIN_TOKENS;
    const Operand operand_ = !m_.quantised() ? Operand::BF16 : amx_ ? Operand::INT16_BYTES : Operand::INT16;
    std::atomic<bool> aborted_{false};
    alignas(64) std::atomic<size_t> next_span_{0};
    alignas(64) std::atomic<size_t> next_pack_{0};
    alignas(64) std::atomic<size_t> next_tile_{0};
};

}  // namespace ovf
