// Tree attention on the CPU: every position reads its own token and the last complete node of each level.
//
// Work items are (batch row, chunk of kChunk positions). A node is read by a run of neighbouring positions, so of
// the nodes that a chunk reads only the first of each level can also be read by the chunk before: its gradient
// goes to a buffer private to the chunk, added afterwards in order. That makes the gradient free of races and the
// same for any number of threads.
//
// A position may ask for a node that the table does not hold: it is left out, and the call returns false.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kChunk = 256;

struct Level {  // rows of the node table: offset + batch * b + node * j + slot * s
    int64_t offset, batch, node, slot, slots, carry;
};

struct Shape {
    int64_t batch, time, heads, dim, levels, arity, rows;
    const Level* level;
    const int32_t* position;  // [batch, time], 1-based in the document, 0 at padding
    int64_t nodes_per_position() const {
        int64_t n = 1;
        for (int64_t i = 0; i < levels; ++i) n += level[i].slots;
        return n;
    }
    int64_t chunks() const { return (time + kChunk - 1) / kChunk; }
};

inline float exponential(float x) {
    // exp by 2^n * e^r, |r| <= ln2 / 2, Taylor to r^7: relative error below 2e-7; vectorises, unlike std::exp.
    x = std::max(x, -87.0f);
    const float n = std::nearbyintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}
inline double exponential(double x) { return std::exp(x); }

// Vectors of a head's size; with D known at compile time they stay in registers.
template <typename T, int D>
struct Head {
    T at[D ? D : 1024];
    int64_t runtime;
    explicit Head(int64_t dim) : runtime(dim) {}
    int64_t dim() const { return D ? D : runtime; }
    Head& load(const T* x) {
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) at[d] = x[d];
        return *this;
    }
    Head& clear() {
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) at[d] = 0;
        return *this;
    }
    T dot(const T* x) const {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim(); ++d) sum += at[d] * x[d];
        return sum;
    }
    void add(T scale, const T* x) {
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) at[d] += scale * x[d];
    }
    void add_to(T scale, T* y) const {
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) y[d] += scale * at[d];
    }
    void store(T scale, T* y) const {
#pragma omp simd
        for (int64_t d = 0; d < dim(); ++d) y[d] = scale * at[d];
    }
};

constexpr int64_t kLanes = 16;
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// x[j] = exp(x[j] * scale - offset) for j < n, in whole vectors: a position sees fewer nodes than a vector has lanes,
// and a loop over a remainder would run one by one. What lies between n and padded(n) is overwritten.
template <typename T>
inline void exponentials(T* x, int64_t n, T scale, T offset) {
    for (int64_t j = 0; j < padded(n); j += kLanes)
#pragma omp simd
        for (int64_t k = 0; k < kLanes; ++k) x[j + k] = exponential(scale * x[j + k] - offset);
}

// Counts completed nodes per level while positions go by.
struct Counter {
    const Shape& shape;
    std::vector<int64_t> done, power;
    explicit Counter(const Shape& s) : shape(s), done(s.levels, 0), power(s.levels) {
        int64_t p = 1;
        for (int64_t i = 0; i < s.levels; ++i) power[i] = (p *= s.arity);
    }
    void pass(int64_t t) {
        if (t)
            for (int64_t i = 0; i < shape.levels && t % power[i] == 0; ++i) ++done[i];
    }
};

// Number of nodes completed before each chunk of each row: [batch, chunks, levels].
std::vector<int64_t> completed_before(const Shape& s) {
    std::vector<int64_t> before(s.batch * s.chunks() * s.levels);
#pragma omp parallel for
    for (int64_t b = 0; b < s.batch; ++b) {
        Counter counter(s);
        for (int64_t l = 0; l < s.time; ++l) {
            if (l % kChunk == 0)
                std::copy(counter.done.begin(), counter.done.end(),
                          before.begin() + (b * s.chunks() + l / kChunk) * s.levels);
            counter.pass(s.position[b * s.time + l]);
        }
    }
    return before;
}

// Calls read(item, token, n, rows, index, two scratch arrays, scratch pointers) for every token: rows[0] is the
// token's own query, key, value; rows[j] the query and value of the j-th visible node, index[j] its row number.
// Returns whether the table holds all nodes that are visible.
template <typename T, typename Read>
bool for_each_position(const Shape& s, const T* own, const T* nodes, Read read) {
    const int64_t width = s.heads * s.dim, most = s.nodes_per_position(), chunks = s.chunks();
    const std::vector<int64_t> before = completed_before(s);
    bool held = true;
#pragma omp parallel reduction(&& : held)
    {
        std::vector<const T*> row(most);
        std::vector<int64_t> index(most, -1);
        std::vector<T> scratch(2 * padded(most), T(0));
        std::vector<T*> pointers(most);
        Counter counter(s);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < s.batch * chunks; ++item) {
            const int64_t b = item / chunks, begin = item % chunks * kChunk;
            std::copy_n(before.begin() + item * s.levels, s.levels, counter.done.begin());
            for (int64_t l = begin; l < std::min(s.time, begin + kChunk); ++l) {
                const int64_t t = s.position[b * s.time + l];
                counter.pass(t);
                int64_t n = 0;
                if (t) {
                    row[n++] = own + (b * s.time + l) * 3 * width;
                    for (int64_t i = 0; i < s.levels && t >= counter.power[i]; ++i) {
                        const Level& level = s.level[i];
                        const int64_t node = counter.done[i] + level.carry - 1;
                        for (int64_t k = 0; k < level.slots; ++k) {
                            const int64_t at = level.offset + level.batch * b + level.node * node + level.slot * k;
                            if (node < 0 || at >= s.rows) {  // no field of a level is negative
                                held = false;
                                continue;
                            }
                            index[n] = at;
                            row[n++] = nodes + at * 2 * width;
                        }
                    }
                }
                read(item, b * s.time + l, n, row.data(), index.data(), scratch.data(), scratch.data() + padded(most),
                     pointers.data());
            }
        }
    }
    return held;
}

template <typename T, int D>
bool forward(const Shape& s, const T* own, const T* nodes, T scale, T* out, T* lse) {
    const int64_t width = s.heads * s.dim, H = s.heads, dim = D ? D : s.dim;
    return for_each_position<T>(s, own, nodes, [=](int64_t, int64_t at, int64_t n, const T* const* row,
                                                   const int64_t*, T* score, T*, T**) {
        T* y = out + at * width;
        if (!n) {
            std::fill_n(y, width, T(0));
            std::fill_n(lse + at * H, H, -std::numeric_limits<T>::infinity());
            return;
        }
        Head<T, D> key(dim), sum(dim);
        for (int64_t h = 0; h < H; ++h) {
            const int64_t o = h * dim;
            key.load(own + at * 3 * width + width + o);
            // The own token's value lies two widths behind its query, a node's one.
            score[0] = scale * key.dot(row[0] + o);
            T top = score[0];
            for (int64_t j = 1; j < n; ++j) {
                score[j] = scale * key.dot(row[j] + o);
                top = std::max(top, score[j]);
            }
            exponentials(score, n, T(1), top);
            T total = score[0];
            sum.clear().add(score[0], row[0] + 2 * width + o);
            for (int64_t j = 1; j < n; ++j) {
                total += score[j];
                sum.add(score[j], row[j] + width + o);
            }
            sum.store(1 / total, y + o);
            lse[at * H + h] = top + std::log(total);
        }
    });
}

template <typename T, int D>
bool backward(const Shape& s, const T* own, const T* nodes, T scale, const T* out, const T* lse, const T* grad_out,
              const T* grad_lse, T* grad_own, T* grad_nodes) {
    const int64_t width = s.heads * s.dim, H = s.heads, dim = D ? D : s.dim, most = s.nodes_per_position();
    const int64_t items = s.batch * s.chunks();
    // The first node of each level and slot that a chunk reads: its row, and its gradient so far.
    std::vector<int64_t> shared_row(items * most, -1);
    std::vector<T> shared(items * most * 2 * width, T(0));
    int64_t* first = shared_row.data();
    T* apart = shared.data();
    const bool held = for_each_position<T>(s, own, nodes, [=](int64_t item, int64_t at, int64_t n, const T* const* row,
                                                              const int64_t* index, T* p, T* ds, T** target) {
        T* d_own = grad_own + at * 3 * width;
        if (!n) {
            std::fill_n(d_own, 3 * width, T(0));
            return;
        }
        for (int64_t j = 1; j < n; ++j) {
            const int64_t k = item * most + j;
            if (first[k] < 0) first[k] = index[j];
            target[j] = first[k] == index[j] ? apart + k * 2 * width : grad_nodes + index[j] * 2 * width;
        }
        Head<T, D> key(dim), g(dim), d_key(dim);
        for (int64_t h = 0; h < H; ++h) {
            const int64_t o = h * dim;
            key.load(own + at * 3 * width + width + o);
            g.load(grad_out + at * width + o);
            const T delta = g.dot(out + at * width + o) - grad_lse[at * H + h], offset = lse[at * H + h];
            p[0] = key.dot(row[0] + o);
            ds[0] = g.dot(row[0] + 2 * width + o);
            for (int64_t j = 1; j < n; ++j) {
                p[j] = key.dot(row[j] + o);
                ds[j] = g.dot(row[j] + width + o);
            }
            exponentials(p, n, scale, offset);
            for (int64_t j = 0; j < padded(n); j += kLanes)
#pragma omp simd
                for (int64_t k = 0; k < kLanes; ++k) ds[j + k] = scale * p[j + k] * (ds[j + k] - delta);
            d_key.clear().add(ds[0], row[0] + o);
            key.store(ds[0], d_own + o);
            g.store(p[0], d_own + 2 * width + o);
            for (int64_t j = 1; j < n; ++j) {
                d_key.add(ds[j], row[j] + o);
                key.add_to(ds[j], target[j] + o);
                g.add_to(p[j], target[j] + width + o);
            }
            d_key.store(1, d_own + width + o);
        }
    });
#pragma omp parallel for
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t k = b * s.chunks() * most; k < (b + 1) * s.chunks() * most; ++k)
            if (first[k] >= 0)
                for (int64_t d = 0; d < 2 * width; ++d)
                    grad_nodes[first[k] * 2 * width + d] += apart[k * 2 * width + d];
    return held;
}

template <typename T, typename F>
bool by_dim(int64_t dim, F call) {
    switch (dim) {
        case 8: return call(std::integral_constant<int, 8>{});
        case 16: return call(std::integral_constant<int, 16>{});
        case 32: return call(std::integral_constant<int, 32>{});
        case 64: return call(std::integral_constant<int, 64>{});
        case 128: return call(std::integral_constant<int, 128>{});
        default: return call(std::integral_constant<int, 0>{});
    }
}

Shape make_shape(const int64_t* sizes, const int64_t* levels, const int32_t* position) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
            reinterpret_cast<const Level*>(levels), position};
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    extern "C" bool tree_attention_forward_##NAME(const int64_t* sizes, const int64_t* levels, const int32_t* pos,   \
                                                  const T* own, const T* nodes, double scale, T* out, T* lse) {      \
        const Shape s = make_shape(sizes, levels, pos);                                                              \
        return by_dim<T>(s.dim, [&](auto d) { return forward<T, d()>(s, own, nodes, T(scale), out, lse); });         \
    }                                                                                                                \
    extern "C" bool tree_attention_backward_##NAME(const int64_t* sizes, const int64_t* levels, const int32_t* pos,  \
                                                   const T* own, const T* nodes, double scale, const T* out,         \
                                                   const T* lse, const T* grad_out, const T* grad_lse, T* grad_own,  \
                                                   T* grad_nodes) {                                                  \
        const Shape s = make_shape(sizes, levels, pos);                                                              \
        return by_dim<T>(s.dim, [&](auto d) {                                                                        \
            return backward<T, d()>(s, own, nodes, T(scale), out, lse, grad_out, grad_lse, grad_own, grad_nodes);    \
        });                                                                                                          \
    }

EXPORT(float32, float)
EXPORT(float64, double)
