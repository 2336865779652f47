// Tree attention on the CPU: every position reads its own token and the last complete node of each level.
//
// Work items are (batch row, chunk of kChunk positions). A node is read by a run of neighbouring positions, so of
// the nodes that a chunk reads only the first of each level can also be read by the chunk before: its gradient
// goes to a buffer private to the chunk, added afterwards in order. That makes the gradient free of races and the
// same for any number of threads.
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
    int64_t batch, time, heads, dim, levels, arity;
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

template <typename T, int D>
inline T dot(const T* a, const T* b, int64_t dim) {
    const int64_t n = D ? D : dim;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
    return sum;
}

template <typename T, int D>
inline void axpy(T scale, const T* x, T* y, int64_t dim) {
    const int64_t n = D ? D : dim;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) y[d] += scale * x[d];
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

template <typename T, int D, typename Read>
void for_each_position(const Shape& s, const T* own, const T* nodes, Read read) {
    const int64_t width = s.heads * s.dim, most = s.nodes_per_position();
    const std::vector<int64_t> before = completed_before(s);
#pragma omp parallel
    {
        std::vector<const T*> query(most), value(most);
        std::vector<int64_t> row(most), index(s.levels);
        Counter counter(s);
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t c = 0; c < s.chunks(); ++c) {
                const int64_t item = b * s.chunks() + c;
                std::copy_n(before.begin() + item * s.levels, s.levels, counter.done.begin());
                for (int64_t l = c * kChunk; l < std::min(s.time, (c + 1) * kChunk); ++l) {
                    const int64_t t = s.position[b * s.time + l];
                    counter.pass(t);
                    int64_t n = 0;
                    if (t) {
                        const T* token = own + (b * s.time + l) * 3 * width;
                        query[0] = token, value[0] = token + 2 * width, row[0] = -1, n = 1;
                        for (int64_t i = 0; i < s.levels && t >= counter.power[i]; ++i) {
                            const Level& level = s.level[i];
                            index[i] = counter.done[i] + level.carry - 1;
                            for (int64_t k = 0; k < level.slots; ++k, ++n) {
                                row[n] = level.offset + level.batch * b + level.node * index[i] + level.slot * k;
                                query[n] = nodes + row[n] * 2 * width;
                                value[n] = query[n] + width;
                            }
                        }
                    }
                    read(item, b * s.time + l, n, query.data(), value.data(), row.data());
                }
            }
    }
}

template <typename T, int D>
void forward(const Shape& s, const T* own, const T* nodes, T scale, T* out, T* lse) {
    const int64_t width = s.heads * s.dim, H = s.heads, dim = s.dim;
    for_each_position<T, D>(s, own, nodes, [&](int64_t, int64_t at, int64_t n, const T** query, const T** value,
                                               const int64_t*) {
        T* y = out + at * width;
        std::fill_n(y, width, T(0));
        if (!n) {
            std::fill_n(lse + at * H, H, -std::numeric_limits<T>::infinity());
            return;
        }
        static thread_local std::vector<T> score;
        score.resize(n);
        const T* key = own + at * 3 * width + width;
        for (int64_t h = 0; h < H; ++h) {
            const int64_t o = h * dim;
            T top = -std::numeric_limits<T>::infinity();
            for (int64_t j = 0; j < n; ++j) {
                score[j] = scale * dot<T, D>(query[j] + o, key + o, dim);
                top = std::max(top, score[j]);
            }
            T sum = 0;
            T* p = score.data();
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; ++j) {
                p[j] = exponential(p[j] - top);
                sum += p[j];
            }
            for (int64_t j = 0; j < n; ++j) axpy<T, D>(p[j] / sum, value[j] + o, y + o, dim);
            lse[at * H + h] = top + std::log(sum);
        }
    });
}

template <typename T, int D>
void backward(const Shape& s, const T* own, const T* nodes, T scale, const T* out, const T* lse, const T* grad_out,
              const T* grad_lse, T* grad_own, T* grad_nodes) {
    const int64_t width = s.heads * s.dim, H = s.heads, dim = s.dim, most = s.nodes_per_position();
    const int64_t items = s.batch * s.chunks();
    // The first node of each level and slot that a chunk reads: its row, and its gradient so far.
    std::vector<int64_t> shared_row(items * most, -1);
    std::vector<T> shared(items * most * 2 * width, T(0));
    for_each_position<T, D>(s, own, nodes, [&](int64_t item, int64_t at, int64_t n, const T** query, const T** value,
                                               const int64_t* row) {
        T* d_own = grad_own + at * 3 * width;
        std::fill_n(d_own, 3 * width, T(0));
        if (!n) return;
        static thread_local std::vector<T*> target;
        target.resize(n);
        target[0] = nullptr;
        for (int64_t j = 1; j < n; ++j) {
            int64_t& first = shared_row[item * most + j];
            if (first < 0) first = row[j];
            target[j] = first == row[j] ? shared.data() + (item * most + j) * 2 * width
                                        : grad_nodes + row[j] * 2 * width;
        }
        const T *key = own + at * 3 * width + width, *g = grad_out + at * width, *y = out + at * width;
        for (int64_t h = 0; h < H; ++h) {
            const int64_t o = h * dim;
            const T delta = dot<T, D>(g + o, y + o, dim) - grad_lse[at * H + h], offset = lse[at * H + h];
            for (int64_t j = 0; j < n; ++j) {
                const T p = exponential(scale * dot<T, D>(query[j] + o, key + o, dim) - offset);
                const T ds = scale * p * (dot<T, D>(g + o, value[j] + o, dim) - delta);
                axpy<T, D>(ds, query[j] + o, d_own + width + o, dim);
                T* dq = j ? target[j] : d_own;
                T* dv = j ? target[j] + width : d_own + 2 * width;
                axpy<T, D>(ds, key + o, dq + o, dim);
                axpy<T, D>(p, g + o, dv + o, dim);
            }
        }
    });
#pragma omp parallel for
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t k = b * s.chunks() * most; k < (b + 1) * s.chunks() * most; ++k)
            if (shared_row[k] >= 0)
                axpy<T, 0>(T(1), shared.data() + k * 2 * width, grad_nodes + shared_row[k] * 2 * width, 2 * width);
}

template <typename T, typename F>
void by_dim(int64_t dim, F call) {
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
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], reinterpret_cast<const Level*>(levels), position};
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    extern "C" void tree_attention_forward_##NAME(const int64_t* sizes, const int64_t* levels, const int32_t* pos,   \
                                                  const T* own, const T* nodes, double scale, T* out, T* lse) {      \
        const Shape s = make_shape(sizes, levels, pos);                                                              \
        by_dim<T>(s.dim, [&](auto d) { forward<T, d()>(s, own, nodes, T(scale), out, lse); });                       \
    }                                                                                                                \
    extern "C" void tree_attention_backward_##NAME(const int64_t* sizes, const int64_t* levels, const int32_t* pos,  \
                                                   const T* own, const T* nodes, double scale, const T* out,         \
                                                   const T* lse, const T* grad_out, const T* grad_lse, T* grad_own,  \
                                                   T* grad_nodes) {                                                  \
        const Shape s = make_shape(sizes, levels, pos);                                                              \
        by_dim<T>(s.dim, [&](auto d) {                                                                               \
            backward<T, d()>(s, own, nodes, T(scale), out, lse, grad_out, grad_lse, grad_own, grad_nodes);           \
        });                                                                                                          \
    }

EXPORT(float32, float)
EXPORT(float64, double)
