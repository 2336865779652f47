// Slot attention on the CPU: the queries and heads that share a set lie in the lanes of a tile, its slots are the rows.
// Sets shared by few would leave most lanes empty: they go row by row, with the head's dim in the registers.
#include "_tile.hpp"

namespace {

using namespace tile;

constexpr int64_t kFew = 6;  // rows (or slots of a block) below which one by one is faster

struct Shape {  // bounds are of packed queries and slots; strides in numbers, of a token or slot and of a head
    int64_t sequences, heads, kv_heads, dim, groups, picks, query_block, slot_block;
    int64_t q_token, q_head, k_slot, k_head, v_slot, v_head;
    const int64_t *queries, *slots, *sets, *start, *visible;  // sets: number of each sequence's first one
    const int32_t* index;  // [sets, groups, picks]

    int64_t shared() const { return heads / groups; }  // heads that share a set
    int64_t kv_of(int64_t group) const { return group * shared() / (heads / kv_heads); }
};

struct Set {  // queries first .. first + n - 1 of a sequence (numbers of this call)
    int64_t sequence, number, first, n;
};

std::vector<Set> sets_of(const Shape& s) {
    std::vector<Set> sets;
    for (int64_t b = 0; b < s.sequences; ++b) {
        const int64_t time = s.queries[b + 1] - s.queries[b], Q = s.query_block, start = s.start ? s.start[b] : 0;
        for (int64_t i = 0, number = s.sets[b]; i < time; ++number) {
            const int64_t end = std::min(time, ((start + i) / Q + 1) * Q - start);
            sets.push_back({b, number, i, end - i});
            i = end;
        }
    }
    return sets;
}

// Calls take(slot row in the packed slots, first query of the sequence that sees it) for each slot of a set.
template <typename Take>
void slots_of(const Shape& s, const Set& set, int64_t group, Take take) {
    const int64_t begin = s.slots[set.sequence], count = s.slots[set.sequence + 1] - begin;
    const int32_t* picked = s.index + (set.number * s.groups + group) * s.picks;
    for (int64_t e = 0; e < s.picks; ++e) {
        if (picked[e] < 0) continue;
        const int64_t first = picked[e] * s.slot_block, last = std::min(count, first + s.slot_block);
        for (int64_t n = begin + first; n < begin + last; ++n) take(n, s.visible ? s.visible[n] : 0);
    }
}

template <typename T>
inline T dot(const T* a, const T* b, int64_t dim) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
}

template <typename T>
inline void add(T scale, const T* x, T* y, int64_t dim) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) y[d] += scale * x[d];
}

template <typename T>
struct Inputs {
    const T *q, *k, *v, *bias;  // bias [slots, kv_heads] or null
    T scale;
    T bias_of(const Shape& s, int64_t n, int64_t kv) const { return bias ? bias[n * s.kv_heads + kv] : T(0); }
    // A slot without mass is never read, whatever it holds.
    bool massless(const Shape& s, int64_t n, int64_t kv) const {
        return bias_of(s, n, kv) == -std::numeric_limits<T>::infinity();
    }
};

// joined_out, joined_lse: another attention's result, which the softmax begins from; or null.
template <typename T>
void forward(const Shape& s, const Inputs<T>& in, const T* joined_out, const T* joined_lse, T* out, T* lse) {
    constexpr int L = kLanes<T>;
    const T inf = std::numeric_limits<T>::infinity();
    const std::vector<Set> sets = sets_of(s);
    const int64_t D = s.dim, shared = s.shared();
#pragma omp parallel
    {
        std::vector<T> memory(2 * D * L + kAlign);
        T *qt = aligned(memory), *sums = qt + D * L;
        alignas(64) T top[L], total[L];
        Scratch<T> scratch;
        Rows<T> rows;
        std::vector<T> score(s.picks * s.slot_block);
        std::vector<const T*> value(s.picks * s.slot_block);
#pragma omp for schedule(dynamic, 8)
        for (int64_t item = 0; item < int64_t(sets.size()) * s.groups; ++item) {
            const Set set = sets[item / s.groups];
            const int64_t g = item % s.groups, kv = s.kv_of(g), all = set.n * shared;
            const int64_t token = s.queries[set.sequence] + set.first;
            const auto at_head = [&](int64_t r) { return (token + r / shared) * s.heads + g * shared + r % shared; };
            const auto query = [&](int64_t r) {
                return in.q + (token + r / shared) * s.q_token + (g * shared + r % shared) * s.q_head;
            };
            if (all < kFew) {
                for (int64_t r = 0; r < all; ++r) {
                    const int64_t at = at_head(r);
                    T high = joined_lse ? joined_lse[at] : -inf, *y = out + at * D;
                    int64_t n = 0;
                    slots_of(s, set, g, [&](int64_t slot, int64_t visible) {
                        if (visible > set.first + r / shared || in.massless(s, slot, kv)) return;
                        score[n] = in.scale * dot(query(r), in.k + slot * s.k_slot + kv * s.k_head, D) +
                                   in.bias_of(s, slot, kv);
                        value[n] = in.v + slot * s.v_slot + kv * s.v_head;
                        high = std::max(high, score[n++]);
                    });
                    const T base = high == -inf ? T(0) : high;
                    T sum = joined_lse ? std::exp(joined_lse[at] - base) : T(0);
                    for (int64_t d = 0; d < D; ++d) y[d] = sum > 0 ? sum * joined_out[at * D + d] : T(0);
                    for (int64_t j = 0; j < n; ++j) {
                        const T p = std::exp(score[j] - base);
                        sum += p;
                        add(p, value[j], y, D);
                    }
                    for (int64_t d = 0; d < D; ++d) y[d] = sum > 0 ? y[d] / sum : T(0);
                    lse[at] = high + std::log(sum);
                }
                continue;
            }
            for (int64_t r0 = 0; r0 < all; r0 += L) {
                const int n = int(std::min<int64_t>(L, all - r0));
                const T* row[L];
                for (int j = 0; j < n; ++j) row[j] = query(r0 + j);
                transpose(row, n, D, qt);
                std::fill_n(sums, D * L, T(0));
                std::fill_n(total, L, T(0));
                std::fill_n(top, L, -inf);
                for (int j = 0; joined_lse && j < n; ++j) {
                    const int64_t at = at_head(r0 + j);
                    if (joined_lse[at] == -inf) continue;
                    top[j] = joined_lse[at];
                    total[j] = 1;
                    for (int64_t d = 0; d < D; ++d) sums[d * L + j] = joined_out[at * D + d];
                }
                slots_of(s, set, g, [&](int64_t slot, int64_t visible) {
                    if (in.massless(s, slot, kv)) return;
                    const int64_t unseen = std::max<int64_t>(visible - set.first, 0) * shared - r0;
                    rows.add(in.k + slot * s.k_slot + kv * s.k_head, in.v + slot * s.v_slot + kv * s.v_head,
                             in.bias_of(s, slot, kv), int(std::clamp<int64_t>(unseen, 0, n)), n);
                    if (rows.full()) attend(qt, rows, D, scratch, in.scale, top, total, sums);
                });
                attend(qt, rows, D, scratch, in.scale, top, total, sums);
                for (int j = 0; j < n; ++j) {
                    const int64_t at = at_head(r0 + j);
                    const T share = total[j] > 0 ? 1 / total[j] : 0;
                    for (int64_t d = 0; d < D; ++d) out[at * D + d] = sums[d * L + j] * share;
                    lse[at] = top[j] + std::log(total[j]);
                }
            }
        }
    }
}

template <typename T>
struct Gradients {
    const T *lse, *delta, *g;  // [tokens, heads(, dim)]
    T *dq, *dk, *dv, *dbias;   // contiguous; dk, dv, dbias of every slot are written
};

template <typename T>
void queries_gradient(const Shape& s, const Inputs<T>& in, const Gradients<T>& of, const std::vector<Set>& sets) {
    constexpr int L = kLanes<T>;
    const int64_t D = s.dim, shared = s.shared();
    std::vector<T> memory(3 * D * L + kAlign);
    T *xt = aligned(memory), *yt = xt + D * L, *dx = yt + D * L;
    alignas(64) T lane_lse[L], lane_delta[L];
    Scratch<T> w;
    Rows<T> rows;
    const T *x[L], *y[L];
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < int64_t(sets.size()) * s.groups; ++item) {
        const Set set = sets[item / s.groups];
        const int64_t g = item % s.groups, kv = s.kv_of(g), all = set.n * shared;
        const int64_t token = s.queries[set.sequence] + set.first;
        const auto at_head = [&](int64_t r) { return (token + r / shared) * s.heads + g * shared + r % shared; };
        const auto query = [&](int64_t r) {
            return in.q + (token + r / shared) * s.q_token + (g * shared + r % shared) * s.q_head;
        };
        if (all < kFew) {
            for (int64_t r = 0; r < all; ++r) {
                const int64_t at = at_head(r);
                T* to = of.dq + at * D;
                std::fill_n(to, D, T(0));
                if (!std::isfinite(of.lse[at])) continue;
                slots_of(s, set, g, [&](int64_t slot, int64_t visible) {
                    if (visible > set.first + r / shared || in.massless(s, slot, kv)) return;
                    const T* key = in.k + slot * s.k_slot + kv * s.k_head;
                    const T score = in.scale * dot(query(r), key, D) + in.bias_of(s, slot, kv);
                    const T dp = dot(of.g + at * D, in.v + slot * s.v_slot + kv * s.v_head, D);
                    add(in.scale * std::exp(score - of.lse[at]) * (dp - of.delta[at]), key, to, D);
                });
            }
            continue;
        }
        for (int64_t r0 = 0; r0 < all; r0 += L) {
            const int n = int(std::min<int64_t>(L, all - r0));
            std::fill_n(lane_lse, L, T(0));
            std::fill_n(lane_delta, L, T(0));
            for (int j = 0; j < n; ++j) {
                const int64_t at = at_head(r0 + j);
                x[j] = query(r0 + j);
                y[j] = of.g + at * D;
                lane_lse[j] = std::isfinite(of.lse[at]) ? of.lse[at] : T(0);
                lane_delta[j] = of.delta[at];
            }
            transpose(x, n, D, xt);
            transpose(y, n, D, yt);
            std::fill_n(dx, D * L, T(0));
            const auto take = [&] {
                if (!rows.n) return;
                weights(xt, yt, rows, D, w, in.scale, lane_lse, lane_delta);
                accumulate(w.s, rows.x, rows.n, D, dx);
                rows.n = 0;
            };
            slots_of(s, set, g, [&](int64_t slot, int64_t visible) {
                if (in.massless(s, slot, kv)) return;
                const int64_t unseen = std::max<int64_t>(visible - set.first, 0) * shared - r0;
                rows.add(in.k + slot * s.k_slot + kv * s.k_head, in.v + slot * s.v_slot + kv * s.v_head,
                         in.bias_of(s, slot, kv), int(std::clamp<int64_t>(unseen, 0, n)), n);
                if (rows.full()) take();
            });
            take();
            for (int j = 0; j < n; ++j)
                for (int64_t d = 0; d < D; ++d) of.dq[at_head(r0 + j) * D + d] = in.scale * dx[d * L + j];
        }
    }
}

// Who picked each slot block: blocks of a sequence follow one another, `block_begin` numbers each sequence's first;
// readers[offset[b * kv_heads + kv] ..] are entries set * groups + group, in order.
struct Readers {
    const int64_t *block_begin, *offset;
    const int64_t* entry;
};

template <typename T>
void slots_gradient(const Shape& s, const Inputs<T>& in, const Gradients<T>& of, const std::vector<Set>& sets,
                    const Readers& readers) {
    constexpr int L = kLanes<T>;
    const int64_t D = s.dim, shared = s.shared(), blocks = readers.block_begin[s.sequences];
    // Sets by number: rows of batched sets may be allocated larger than what is used.
    int64_t most = 0;
    for (const Set& set : sets) most = std::max(most, set.number + 1);
    std::vector<const Set*> numbered(most, nullptr);
    for (const Set& set : sets) numbered[set.number] = &set;
    std::vector<T> memory(4 * D * L + kAlign), zero(D, T(0));
    T *xt = aligned(memory), *yt = xt + D * L, *dx = yt + D * L, *dy = dx + D * L;
    alignas(64) T lane_bias[L], lane_dbias[L];
    Scratch<T> w;
    Rows<T> rows;
    const T *x[L], *y[L];
#pragma omp for schedule(dynamic, 4)
    for (int64_t item = 0; item < blocks * s.kv_heads; ++item) {
        const int64_t block = item / s.kv_heads, kv = item % s.kv_heads;
        const int64_t b = std::upper_bound(readers.block_begin, readers.block_begin + s.sequences + 1, block) -
                          readers.block_begin - 1;
        const int64_t slot0 = s.slots[b] + (block - readers.block_begin[b]) * s.slot_block;
        const int64_t slot_end = std::min(s.slots[b + 1], slot0 + s.slot_block);
        const int64_t begin = readers.offset[item], end = readers.offset[item + 1];
        // Calls take(query, its row number [token, head], its number in the sequence) for every reader.
        const auto each_reader = [&](auto take) {
            for (int64_t e = begin; e < end; ++e) {
                const int64_t number = readers.entry[e] / s.groups, g = readers.entry[e] % s.groups;
                if (number >= most || !numbered[number]) continue;
                const Set& set = *numbered[number];
                for (int64_t i = set.first; i < set.first + set.n; ++i)
                    for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
                        const int64_t token = s.queries[b] + i, at = token * s.heads + h;
                        if (std::isfinite(of.lse[at])) take(in.q + token * s.q_token + h * s.q_head, at, i);
                    }
            }
        };
        if (slot_end - slot0 < kFew) {
            for (int64_t slot = slot0; slot < slot_end; ++slot) {
                T *to_k = of.dk + (slot * s.kv_heads + kv) * D, *to_v = of.dv + (slot * s.kv_heads + kv) * D, to_bias = 0;
                const T *key = in.k + slot * s.k_slot + kv * s.k_head, *val = in.v + slot * s.v_slot + kv * s.v_head;
                const T bias = in.bias_of(s, slot, kv);
                std::fill_n(to_k, D, T(0));
                std::fill_n(to_v, D, T(0));
                each_reader([&](const T* query, int64_t at, int64_t i) {
                    if ((s.visible && s.visible[slot] > i) || in.massless(s, slot, kv)) return;
                    const T* g = of.g + at * D;
                    const T p = std::exp(in.scale * dot(query, key, D) + bias - of.lse[at]);
                    const T ds = p * (dot(g, val, D) - of.delta[at]);
                    add(in.scale * ds, query, to_k, D);
                    add(p, g, to_v, D);
                    to_bias += ds;
                });
                of.dbias[slot * s.kv_heads + kv] = to_bias;
            }
            continue;
        }
        for (int64_t first = slot0; first < slot_end; first += L) {
            const int n = int(std::min<int64_t>(L, slot_end - first));
            int64_t latest = 0;
            std::fill_n(lane_bias, L, T(0));
            for (int j = 0; j < n; ++j) {
                const bool none = in.massless(s, first + j, kv);
                x[j] = none ? zero.data() : in.k + (first + j) * s.k_slot + kv * s.k_head;
                y[j] = none ? zero.data() : in.v + (first + j) * s.v_slot + kv * s.v_head;
                lane_bias[j] = in.bias_of(s, first + j, kv);
                if (s.visible) latest = std::max(latest, s.visible[first + j]);
            }
            transpose(x, n, D, xt);
            transpose(y, n, D, yt);
            std::fill_n(dx, 2 * D * L, T(0));
            std::fill_n(lane_dbias, L, T(0));
            int64_t number[kChunk];
            const auto take = [&] {
                if (!rows.n) return;
                weights(xt, yt, rows, D, w, in.scale, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr),
                        lane_bias);
                for (int j = 0; j < rows.n; ++j)
                    for (int i = 0; number[j] < latest && i < n; ++i)
                        if (s.visible[first + i] > number[j]) w.p[j * L + i] = w.s[j * L + i] = 0;
                accumulate(w.p, rows.y, rows.n, D, dy);
                accumulate(w.s, rows.x, rows.n, D, dx);
                for (int j = 0; j < rows.n; ++j)
                    for (int i = 0; i < n; ++i) lane_dbias[i] += w.s[j * L + i];
                rows.n = 0;
            };
            each_reader([&](const T* query, int64_t at, int64_t i) {
                number[rows.n] = i;
                rows.add(query, of.g + at * D, -of.lse[at], 0, n, of.delta[at]);
                if (rows.full()) take();
            });
            take();
            for (int j = 0; j < n; ++j) {
                const int64_t to = (first + j) * s.kv_heads + kv;
                of.dbias[to] = lane_dbias[j];
                for (int64_t d = 0; d < D; ++d) {
                    of.dk[to * D + d] = in.scale * dx[d * L + j];
                    of.dv[to * D + d] = dy[d * L + j];
                }
            }
        }
    }
}

template <typename T>
void backward(const Shape& s, const Inputs<T>& in, const Gradients<T>& of, const Readers& readers) {
    const std::vector<Set> sets = sets_of(s);
#pragma omp parallel
    {
        queries_gradient(s, in, of, sets);
        slots_gradient(s, in, of, sets, readers);
    }
}

Shape make_shape(const int64_t* n, const int64_t* queries, const int64_t* slots, const int64_t* sets,
                 const int64_t* start, const int64_t* visible, const int32_t* index) {
    return {n[0], n[1], n[2],  n[3],  n[4],  n[5],    n[6],  n[7], n[8],  n[9],
            n[10], n[11], n[12], n[13], queries, slots, sets, start, visible, index};
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    extern "C" void slot_attention_forward_##NAME(                                                                   \
        const int64_t* sizes, const int64_t* queries, const int64_t* slots, const int64_t* sets,                     \
        const int64_t* start, const int64_t* visible, const int32_t* index, const T* q, const T* k, const T* v,      \
        const T* bias, double scale, const T* joined_out, const T* joined_lse, T* out, T* lse) {                     \
        forward<T>(make_shape(sizes, queries, slots, sets, start, visible, index), {q, k, v, bias, T(scale)},        \
                   joined_out, joined_lse, out, lse);                                                                \
    }                                                                                                                \
    extern "C" void slot_attention_backward_##NAME(                                                                  \
        const int64_t* sizes, const int64_t* queries, const int64_t* slots, const int64_t* sets,                     \
        const int64_t* start, const int64_t* visible, const int32_t* index, const T* q, const T* k, const T* v,      \
        const T* bias, double scale, const T* lse, const T* delta, const T* g, const int64_t* block_begin,           \
        const int64_t* offset, const int64_t* entry, T* dq, T* dk, T* dv, T* dbias) {                                \
        backward<T>(make_shape(sizes, queries, slots, sets, start, visible, index), {q, k, v, bias, T(scale)},       \
                    {lse, delta, g, dq, dk, dv, dbias}, {block_begin, offset, entry});                               \
    }

EXPORT(float32, float)
EXPORT(float64, double)
