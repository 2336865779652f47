// Attention of a tile of vectors over listed rows, the CPU's way: one vector register holds one number of many
// queries, so that softmax needs no work across lanes, and every row is read number by number and broadcast.
//
// Two products carry everything: scores (lanes x rows, summed over dim) and accumulate (lanes x dim, summed over
// rows). Forward: queries in the lanes, keys as rows. Gradient of queries: the same. Gradient of keys and values: keys
// in the lanes, queries as rows, each tile of keys written by one thread only, so there are no races.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace tile {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8;  // of a register; rows whose products are kept in registers at a time
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 4;
#else
constexpr int kBytes = 16, kRows = 4;
#endif
constexpr int kChunk = 64;  // rows between two updates of the running maximum

template <typename T>
struct Of;
template <>
struct Of<float> {
    typedef float V __attribute__((vector_size(kBytes)));
    typedef int32_t I __attribute__((vector_size(kBytes)));
};
template <>
struct Of<double> {
    typedef double V __attribute__((vector_size(kBytes)));
    typedef int64_t I __attribute__((vector_size(kBytes)));
};
template <typename T>
using V = typename Of<T>::V;

template <typename T>
constexpr int kVector = kBytes / sizeof(T);
template <typename T>
constexpr int kLanes = 2 * kVector<T>;

// Where a register's width of memory begins in a buffer that has kAlign numbers to spare.
constexpr int kAlign = 32;
template <typename T>
T* aligned(std::vector<T>& memory) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

template <typename T>
inline V<T>& at(T* x) {
    return *reinterpret_cast<V<T>*>(x);
}
template <typename T>
inline const V<T>& at(const T* x) {
    return *reinterpret_cast<const V<T>*>(x);
}

// exp by 2^n e^r as in tree attention; what lies below the smallest normal number becomes 0, as −inf must.
inline V<float> exponential(V<float> x) {
    typedef Of<float>::I I;
    const I gone = x < -87.0f;
    x = gone ? (V<float>{} - 87.0f) : x;
    const V<float> magic = V<float>{} + 12582912.0f;  // adding it rounds to a whole number
    const V<float> n = (x * 1.44269504088896341f + magic) - magic;
    V<float> r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V<float> p = V<float>{} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const I bits = (__builtin_convertvector(n, I) + 127) << 23;
    p = p * (V<float>)bits;
    return gone ? V<float>{} : p;
}
inline V<double> exponential(V<double> x) {
    for (int i = 0; i < kVector<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// A tile's vectors transposed: dim x lanes, lanes beyond `n` zero.
template <typename T>
void transpose(const T* const* row, int n, int64_t dim, T* xt) {
    constexpr int L = kLanes<T>;
    for (int64_t d = 0; d < dim; ++d)
        for (int i = 0; i < L; ++i) xt[d * L + i] = i < n ? row[i][d] : T(0);
}

// s[j][lane] = sum_d xt[d][lane] * row[j][d], for j < n; s and row have room for n rounded up to kRows.
template <typename T>
void scores(const T* xt, const T** row, int n, int64_t dim, T* s) {
    constexpr int L = kLanes<T>, W = kVector<T>;
    for (int j = n; j % kRows; ++j) row[j] = row[n - 1];
    for (int j = 0; j < n; j += kRows) {
        V<T> sum[kRows][2] = {};
        for (int64_t d = 0; d < dim; ++d) {
            const V<T> a = at(xt + d * L), b = at(xt + d * L + W);
#pragma GCC unroll 8
            for (int k = 0; k < kRows; ++k) {
                const T y = row[j + k][d];
                sum[k][0] += a * y;
                sum[k][1] += b * y;
            }
        }
        for (int k = 0; k < kRows; ++k) {
            at(s + (j + k) * L) = sum[k][0];
            at(s + (j + k) * L + W) = sum[k][1];
        }
    }
}

template <typename T, int N>
inline void accumulate_block(const T* p, const T* const* row, int n, int64_t d, T* ot) {
    constexpr int L = kLanes<T>, W = kVector<T>;
    V<T> sum[N][2];
    for (int k = 0; k < N; ++k) {
        sum[k][0] = at(ot + (d + k) * L);
        sum[k][1] = at(ot + (d + k) * L + W);
    }
    for (int j = 0; j < n; ++j) {
        const V<T> a = at(p + j * L), b = at(p + j * L + W);
        const T* y = row[j] + d;
#pragma GCC unroll 8
        for (int k = 0; k < N; ++k) {
            sum[k][0] += a * y[k];
            sum[k][1] += b * y[k];
        }
    }
    for (int k = 0; k < N; ++k) {
        at(ot + (d + k) * L) = sum[k][0];
        at(ot + (d + k) * L + W) = sum[k][1];
    }
}

// ot[d][lane] += sum_j p[j][lane] * row[j][d]
template <typename T>
void accumulate(const T* p, const T* const* row, int n, int64_t dim, T* ot) {
    int64_t d = 0;
    for (; d + kRows <= dim; d += kRows) accumulate_block<T, kRows>(p, row, n, d, ot);
    for (; d < dim; ++d) accumulate_block<T, 1>(p, row, n, d, ot);
}

// Up to kChunk rows: two vectors each (keys and values, or queries and gradients), an offset added to the scores, and
// the lanes first .. last - 1 that see the row.
template <typename T>
struct Rows {
    int n = 0;
    const T *x[kChunk], *y[kChunk];
    T offset[kChunk];
    int first[kChunk], last[kChunk];
    T a[kChunk];  // with queries as rows: their delta
    bool full() const { return n == kChunk; }
    void add(const T* key, const T* value, T bias, int from, int to, T more = 0) {
        if (from >= to) return;
        x[n] = key, y[n] = value, offset[n] = bias, first[n] = from, last[n] = to, a[n] = more;
        ++n;
    }
};

template <typename T>
struct Scratch {
    alignas(64) T s[kChunk * kLanes<T>], p[kChunk * kLanes<T>];
};

template <typename T>
struct LaneNumbers {
    alignas(64) T at[kLanes<T>];
    constexpr LaneNumbers() : at{} {
        for (int i = 0; i < kLanes<T>; ++i) at[i] = T(i);
    }
};
template <typename T>
inline constexpr LaneNumbers<T> lane_numbers{};

// What lies outside a row's lanes becomes −inf.
template <typename T>
inline void mask(T* s, int first, int last) {
    if (first == 0 && last == kLanes<T>) return;
    const V<T> none = V<T>{} - std::numeric_limits<T>::infinity();
    for (int h = 0; h < 2; ++h) {
        const V<T> lane = at(lane_numbers<T>.at + h * kVector<T>);
        at(s + h * kVector<T>) = (lane >= T(first)) & (lane < T(last)) ? at(s + h * kVector<T>) : none;
    }
}

// The scale is applied to scores, not to queries, so that the backward pass rounds as the forward pass did and the
// weight of a key that outshines all others loses nothing.
//
// The running softmax of a tile of queries: top (maximum so far), total, and sums[dim][lane], not yet divided.
template <typename T>
void attend(const T* qt, Rows<T>& rows, int64_t dim, Scratch<T>& w, T scale, T* top, T* total, T* sums) {
    constexpr int L = kLanes<T>, W = kVector<T>;
    const T inf = std::numeric_limits<T>::infinity();
    if (!rows.n) return;
    scores(qt, rows.x, rows.n, dim, w.s);
    V<T> high[2] = {at(top), at(top + W)};
    for (int j = 0; j < rows.n; ++j) {
        T* s = w.s + j * L;
        for (int h = 0; h < 2; ++h) at(s + h * W) = at(s + h * W) * scale + rows.offset[j];
        mask(s, rows.first[j], rows.last[j]);
        for (int h = 0; h < 2; ++h) high[h] = at(s + h * W) > high[h] ? at(s + h * W) : high[h];
    }
    for (int h = 0; h < 2; ++h) {
        const V<T> base = high[h] == -inf ? V<T>{} : high[h];
        const V<T> shrink = exponential(at(top + h * W) - base);
        V<T> sum = at(total + h * W) * shrink;
        for (int j = 0; j < rows.n; ++j) {
            V<T>& s = at(w.s + j * L + h * W);
            s = exponential(s - base);
            sum += s;
        }
        for (int64_t d = 0; d < dim; ++d) at(sums + d * L + h * W) *= shrink;
        at(top + h * W) = high[h];
        at(total + h * W) = sum;
    }
    accumulate(w.s, rows.y, rows.n, dim, sums);
    rows.n = 0;
}

// p = exp(score − lse) and ds = p (score' − delta), where score' multiplies the second vectors. Queries in the lanes:
// lse and delta per lane. Keys in the lanes: null, rows.offset holds −lse and rows.a delta, lane_offset the bias.
template <typename T>
void weights(const T* xt, const T* yt, Rows<T>& rows, int64_t dim, Scratch<T>& w, T scale, const T* lse,
             const T* delta, const T* lane_offset = nullptr) {
    constexpr int L = kLanes<T>, W = kVector<T>;
    scores(xt, rows.x, rows.n, dim, w.p);
    scores(yt, rows.y, rows.n, dim, w.s);
    for (int j = 0; j < rows.n; ++j) {
        T *p = w.p + j * L, *s = w.s + j * L;
        for (int h = 0; h < 2; ++h) {
            V<T> x = at(p + h * W) * scale + rows.offset[j];
            if (lse) x -= at(lse + h * W);
            if (lane_offset) x += at(lane_offset + h * W);
            at(p + h * W) = x;
        }
        mask(p, rows.first[j], rows.last[j]);
        for (int h = 0; h < 2; ++h) {
            at(p + h * W) = exponential(at(p + h * W));
            const V<T> less = delta ? at(delta + h * W) : V<T>{} + rows.a[j];
            // A weight of 0 may belong to what is never read, whatever it holds.
            at(s + h * W) = at(p + h * W) == 0 ? V<T>{} : at(p + h * W) * (at(s + h * W) - less);
        }
    }
}

}  // namespace tile
