// Bucket lookup on the CPU: one query and head at a time, its candidates never leaving the processor's first caches.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

struct Shape {
    int64_t sequences, heads, kv_heads, dim, tables, probes, slots, picks, each;  // slots: of a row; each: per bucket
    int64_t q_token, q_head, k_slot, k_head;                                      // strides in numbers
    const int64_t* bounds;  // per sequence: batch row, its first and last query and slot, all but the row packed
};

// Newest first, the slots of a sorted table's bucket from `least` on and below `limit`.
template <typename Take>
void newest(const int64_t* keys, int64_t count, int64_t code, int64_t least, int64_t limit, int64_t each, Take take) {
    const int64_t first = code * (int64_t(1) << 32);
    const int64_t* end = std::lower_bound(keys, keys + count, first + limit);
    for (const int64_t* key = end; key > keys && end - key < each;) {
        const int64_t slot = *--key - first;
        if (slot < least) return;  // an older one, or another bucket's
        if (slot < limit) take(slot);
    }
}

template <typename T>
T dot(const T* a, const T* b, int64_t dim) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
    return sum;
}

template <typename T>
void lookup(const Shape& s, const int32_t* codes, const int64_t* keys, const int64_t* available, const int64_t* oldest,
            const T* q, const T* k, const T* bias, T scale, int32_t* index, T* score, int32_t* found) {
    struct Candidate {
        T score;
        int32_t slot;
    };
    const T nothing = -std::numeric_limits<T>::infinity();
    const auto better = [](const Candidate& a, const Candidate& b) {
        return a.score > b.score || (a.score == b.score && a.slot < b.slot);
    };
#pragma omp parallel
    {
        std::vector<Candidate> some(s.tables * s.probes * s.each);
        std::vector<int64_t> seen(s.slots, -1);  // by whom a slot was taken last
        std::vector<T> query(s.dim);
        for (int64_t i = 0; i < s.sequences; ++i) {
            const int64_t *b = s.bounds + 5 * i, row = b[0], count = b[4] - b[3];
            const int64_t inside = b[3] - row * s.slots;  // the row
#pragma omp for schedule(dynamic, 16)
            for (int64_t t = b[1]; t < b[2]; ++t) {
                const int64_t limit = available ? std::min(count, std::max(available[t], int64_t(0))) : count;
                const int64_t least = oldest ? std::max(oldest[t], int64_t(0)) : 0;
                for (int64_t h = 0; h < s.heads; ++h) {
                    const int64_t kv = h * s.kv_heads / s.heads, who = t * s.heads + h;
                    const int32_t* asked = codes + who * s.tables * s.probes;
                    Candidate* end = some.data();
                    for (int64_t lane = 0; lane < s.tables * s.probes; ++lane) {
                        const int64_t table = (row * s.kv_heads + kv) * s.tables + lane / s.probes;
                        newest(keys + table * s.slots + inside, count, asked[lane], least, limit, s.each,
                               [&](int64_t slot) {
                                   if (seen[slot] == who) return;
                                   seen[slot] = who;
                                   (end++)->slot = int32_t(slot);
                               });
                    }
                    found[who] = int32_t(end - some.data());
                    for (int64_t d = 0; d < s.dim; ++d) query[d] = q[t * s.q_token + h * s.q_head + d] * scale;
                    for (Candidate* c = some.data(); c < end; ++c) {
                        const int64_t slot = b[3] + c->slot;
                        T x = dot(query.data(), k + slot * s.k_slot + kv * s.k_head, s.dim);
                        if (bias) x += bias[slot * s.kv_heads + kv];
                        c->score = x == x ? x : nothing;
                    }
                    Candidate* best = std::min(end, some.data() + s.picks);
                    if (best < end) std::nth_element(some.data(), best, end, better);
                    std::sort(some.data(), best, better);
                    for (Candidate* c = some.data(); c < best; ++c) {
                        const int64_t at = who * s.picks + (c - some.data());
                        index[at] = c->score > nothing ? c->slot : -1;
                        score[at] = c->score;
                    }
                }
            }
        }
    }
}

template <typename T>
void call(const int64_t* n, const int64_t* bounds, const int32_t* codes, const int64_t* keys, const int64_t* available,
          const int64_t* oldest, const T* q, const T* k, const T* bias, double scale, int32_t* index, T* score,
          int32_t* found) {
    const Shape s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], bounds};
    lookup<T>(s, codes, keys, available, oldest, q, k, bias, T(scale), index, score, found);
}

}  // namespace

#define FORM(T, name)                                                                                              \
    extern "C" void bucket_lookup_##name(const int64_t* n, const int64_t* bounds, const int32_t* codes,            \
                                         const int64_t* keys, const int64_t* available, const int64_t* oldest,    \
                                         const T* q, const T* k, const T* bias, double scale, int32_t* index,     \
                                         T* score, int32_t* found) {                                               \
        call<T>(n, bounds, codes, keys, available, oldest, q, k, bias, scale, index, score, found);                \
    }

FORM(float, float32)
FORM(double, float64)
