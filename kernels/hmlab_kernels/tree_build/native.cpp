// Tree building on the CPU: each level is a few small matrix products whose rows are children where they lie.
//
// A tile computes kRows rows by one panel of columns in registers, over all terms (taps, banks read, children) of a
// slot; weights are repacked once per call into panels of whole vectors. A level runs on several threads only where
// it has work for them: waking threads for each of many small levels costs more than the levels.
// Gradients of weights are sums over rows: a fixed number of shares, each summed apart, then added in order. So
// nothing depends on the number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6;
#else
constexpr int kBytes = 16, kRows = 4;
#endif
constexpr int64_t kBlock = 64;               // rows of a work item
constexpr int64_t kShared = 1 << 18;         // multiplications that are worth a second thread
constexpr int64_t kPartial = 1 << 22;        // elements in all partial sums of the weights' gradient

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
    static constexpr int lanes = kBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;

struct Level {  // rows of a table: offset + batch * b + node * j + slot * s
    int64_t offset, batch, node, slot, slots, carry;
    int64_t fresh, low;    // new nodes per row; place of the first one's first child where no index is given
    const int64_t* index;  // [batch, fresh, kernel] places in the table below, -1 for none; or null
};

struct Tree {
    int64_t batch, dim, banks, expansion, sources, arity, kernel, levels;
    std::vector<Level> level;  // 0: the leaves
    int64_t rows(int64_t i) const { return batch * level[i].fresh; }
    int64_t slots(int64_t i) const { return i ? level[i].slots / banks : 1; }  // per bank
    int64_t matrices() const { return (1 + expansion) * banks * sources; }
    int64_t matrix(int64_t tap, int64_t bank, int64_t source) const { return (tap * banks + bank) * sources + source; }
    // The slot that `bank` reads of a child of level i.
    int64_t child_slot(int64_t i, int64_t slot, int64_t bank, int64_t source) const {
        return i == 0 ? 0 : slot * banks + (sources > 1 ? source : bank);
    }
};

// Where the new nodes first .. first + count of a level lie, and their children: rows of slot 0.
struct Block {
    int64_t count, node[kBlock];
    std::vector<int64_t> children;  // [kernel, kBlock], -1 for none
    Block(const Tree& s, int64_t i, int64_t first, int64_t last) : count(last - first), children(s.kernel * kBlock) {
        const Level &l = s.level[i], &below = s.level[i - 1];
        int64_t b = first / l.fresh, j = first % l.fresh;
        for (int64_t r = 0; r < count; ++r) {
            node[r] = l.offset + l.batch * b + l.carry + j;
            for (int64_t c = 0; c < s.kernel; ++c) {
                const int64_t place = l.index ? l.index[(first + r) * s.kernel + c] : l.low + j * s.arity + c;
                children[c * kBlock + r] = place < 0 ? -1 : below.offset + below.batch * b + place;
            }
            if (++j == l.fresh) j = 0, ++b;
        }
    }
    const int64_t* child(int64_t c) const { return children.data() + c * kBlock; }
};

// acc[r] += Σ_k a[r][k] · panel[k]; the panel holds V vectors per k.
template <int V, typename T>
inline void multiply(const T* const* a, int64_t length, const T* panel, Vector<T> (&acc)[kRows][V]) {
    constexpr int lanes = VectorOf<T>::lanes;
    for (int64_t k = 0; k < length; ++k) {
        Vector<T> b[V];
        for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Vector<T>*>(panel + (k * V + v) * lanes);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] += a[r][k] * b[v];
    }
}

template <int V, typename T>
inline Vector<T> load(const T* x, int v, int64_t columns) {
    constexpr int64_t lanes = VectorOf<T>::lanes;
    Vector<T> y = {};
    if (columns >= (v + 1) * lanes) return *reinterpret_cast<const Vector<T>*>(x + v * lanes);
    for (int64_t n = v * lanes; n < columns; ++n) y[n - v * lanes] = x[n];
    return y;
}

template <int V, typename T>
inline void store(Vector<T> y, T* x, int v, int64_t columns) {
    constexpr int64_t lanes = VectorOf<T>::lanes;
    if (columns >= (v + 1) * lanes) {
        *reinterpret_cast<Vector<T>*>(x + v * lanes) = y;
        return;
    }
    for (int64_t n = v * lanes; n < columns; ++n) x[n] = y[n - v * lanes];
}

// Columns in panels of V vectors, the last filled up with zeros.
template <typename T, int V>
struct Panels {
    static constexpr int64_t width = V * VectorOf<T>::lanes;
    int64_t columns;
    int64_t count() const { return (columns + width - 1) / width; }
    // Matrix of `length` rows: element (k, n) is x[k * row + n * column].
    void pack(const T* x, int64_t length, int64_t row, int64_t column, T* packed) const {
        for (int64_t p = 0; p < count(); ++p)
            for (int64_t k = 0; k < length; ++k, packed += width)
                for (int64_t n = 0; n < width; ++n)
                    packed[n] = p * width + n < columns ? x[k * row + (p * width + n) * column] : T(0);
    }
};

template <typename T, int V>
void forward(const Tree& s, const T* leaves, const T* taps, const T* bias, T* nodes) {
    const Panels<T, V> panels{s.dim};
    const int64_t dim = s.dim, length = s.kernel * dim, padded = panels.count() * panels.width, W = panels.width;
    std::vector<T> packed(s.matrices() * length * padded), zeros(dim, T(0));
    for (int64_t m = 0; m < s.matrices(); ++m)
        panels.pack(taps + m * length * dim, length, dim, 1, packed.data() + m * length * padded);
    for (int64_t i = 1; i <= s.levels; ++i) {
        const T* below = i == 1 ? leaves : nodes;
        const int64_t rows = s.rows(i), before = s.slots(i - 1), blocks = (rows + kBlock - 1) / kBlock;
        // Children that lie side by side are one long row.
        const int64_t parts = s.level[i].index ? s.kernel : 1, part = length / parts;
        const int64_t work = rows * s.level[i].slots * s.sources * (1 + s.expansion) * length * dim;
#pragma omp parallel for schedule(static) if (work > kShared)
        for (int64_t item = 0; item < s.level[i].slots * blocks; ++item) {
            const int64_t slot = item / blocks, j = slot / s.banks, k = slot % s.banks;
            const int64_t first = item % blocks * kBlock;
            const Block block(s, i, first, std::min(rows, first + kBlock));
            for (int64_t p = 0; p < panels.count(); ++p)
                for (int64_t q = 0; q < block.count; q += kRows) {
                    Vector<T> acc[kRows][V];
                    for (int r = 0; r < kRows; ++r)
                        for (int v = 0; v < V; ++v) acc[r][v] = load<V>(bias + k * dim + p * W, v, dim - p * W);
                    for (int64_t tap = std::max<int64_t>(0, j - before + 1); tap <= std::min(j, s.expansion); ++tap)
                        for (int64_t source = 0; source < s.sources; ++source)
                            for (int64_t c = 0; c < parts; ++c) {
                                const int64_t slots = s.level[i - 1].slot * s.child_slot(i - 1, j - tap, k, source);
                                const T* a[kRows];
                                for (int r = 0; r < kRows; ++r) {  // rows past the last repeat it
                                    const int64_t child = block.child(c)[std::min(q + r, block.count - 1)];
                                    a[r] = child < 0 ? zeros.data() : below + (child + slots) * dim;
                                }
                                const int64_t m = s.matrix(tap, k, source);
                                multiply<V>(a, part, packed.data() + (m * padded + p * W) * length + c * part * W, acc);
                            }
                    for (int r = 0; r < kRows && q + r < block.count; ++r) {
                        T* target = nodes + (block.node[q + r] + s.level[i].slot * slot) * dim + p * W;
                        for (int v = 0; v < V; ++v) store<V>(acc[r][v], target, v, dim - p * W);
                    }
                }
        }
    }
}

// Adds to the gradients of a level's children what its nodes' gradients tell. Children c in [from, to): of these no
// two nodes share one.
template <typename T, int V>
void to_children(const Tree& s, int64_t i, int64_t from, int64_t to, const T* packed, const T* grad, T* grad_below) {
    const Panels<T, V> panels{s.dim};
    const int64_t dim = s.dim, padded = panels.count() * panels.width, W = panels.width, rows = s.rows(i);
    const int64_t blocks = (rows + kBlock - 1) / kBlock, below = s.level[i - 1].slots;
    const int64_t banks = i == 1 || s.sources > 1 ? s.banks : 1;  // that read one slot
    const int64_t times = i == 1 ? s.sources : 1;                 // that a bank reads it
    const int64_t work = rows * below * (1 + s.expansion) * banks * times * (to - from) * dim * dim;
#pragma omp parallel for schedule(static) if (work > kShared)
    for (int64_t item = 0; item < below * blocks; ++item) {
        const int64_t slot = item / blocks, j = i == 1 ? 0 : slot / s.banks, own = i == 1 ? 0 : slot % s.banks;
        const int64_t first = item % blocks * kBlock, slots = s.level[i - 1].slot * slot;
        const Block block(s, i, first, std::min(rows, first + kBlock));
        for (int64_t c = from; c < to; ++c)
            for (int64_t p = 0; p < panels.count(); ++p)
                for (int64_t q = 0; q < block.count; q += kRows) {
                    Vector<T> acc[kRows][V];
                    T* target[kRows];
                    for (int r = 0; r < kRows; ++r) {
                        const int64_t child = q + r < block.count ? block.child(c)[q + r] : -1;
                        target[r] = child < 0 ? nullptr : grad_below + (child + slots) * dim + p * W;
                        for (int v = 0; v < V; ++v)
                            acc[r][v] = target[r] ? load<V>(target[r], v, dim - p * W) : Vector<T>{};
                    }
                    for (int64_t tap = 0; tap <= s.expansion; ++tap)
                        for (int64_t k = banks > 1 ? 0 : own; k < (banks > 1 ? banks : own + 1); ++k) {
                            const T *a[kRows], *slot_grad = grad + s.level[i].slot * ((j + tap) * s.banks + k) * dim;
                            for (int r = 0; r < kRows; ++r)
                                a[r] = slot_grad + block.node[std::min(q + r, block.count - 1)] * dim;
                            for (int64_t t = 0; t < times; ++t) {
                                const int64_t m = s.matrix(tap, k, i == 1 ? t : s.sources > 1 ? own : 0) * s.kernel + c;
                                multiply<V>(a, dim, packed + (m * padded + p * W) * dim, acc);
                            }
                        }
                    for (int r = 0; r < kRows; ++r)
                        for (int v = 0; v < V && target[r]; ++v) store<V>(acc[r][v], target[r], v, dim - p * W);
                }
    }
}

// sum[d] += Σ_r x[r][d] · g[r] for d in [0, D): D rows of one panel of a weight's gradient.
template <int D, int V, typename T>
inline void outer(const T* const* x, int64_t d, int64_t rows, const T* g, T* sum, int64_t stride) {
    constexpr int lanes = VectorOf<T>::lanes;
    Vector<T> acc[D][V];
    for (int e = 0; e < D; ++e)
        for (int v = 0; v < V; ++v) acc[e][v] = load<V>(sum + e * stride, v, V * lanes);
    for (int64_t r = 0; r < rows; ++r) {
        Vector<T> b[V];
        for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Vector<T>*>(g + (r * V + v) * lanes);
        for (int e = 0; e < D; ++e)
            for (int v = 0; v < V; ++v) acc[e][v] += x[r][d + e] * b[v];
    }
    for (int e = 0; e < D; ++e)
        for (int v = 0; v < V; ++v) store<V>(acc[e][v], sum + e * stride, v, V * lanes);
}

// One share of the gradients of weights and bias: of each level the rows [share, share + 1) / shares.
template <typename T, int V>
void to_weights(const Tree& s, int64_t share, int64_t shares, const T* leaves, const T* nodes, const T* grad, T* sum,
                T* sum_bias) {
    const Panels<T, V> panels{s.dim};
    const int64_t dim = s.dim, length = s.kernel * dim, padded = panels.count() * panels.width, W = panels.width;
    std::vector<T> packed(kBlock * padded), zeros(dim, T(0));
    const T* x[kBlock];
    for (int64_t i = 1; i <= s.levels; ++i) {
        const T* below = i == 1 ? leaves : nodes;
        const int64_t begin = s.rows(i) * share / shares, end = s.rows(i) * (share + 1) / shares;
        for (int64_t first = begin; first < end; first += kBlock) {
            const Block block(s, i, first, std::min(end, first + kBlock));
            const int64_t rows = block.count;
            for (int64_t slot = 0; slot < s.level[i].slots; ++slot) {
                const int64_t j = slot / s.banks, k = slot % s.banks;
                for (int64_t r = 0; r < rows; ++r) {
                    const T* g = grad + (block.node[r] + s.level[i].slot * slot) * dim;
                    for (int64_t p = 0; p < panels.count(); ++p)
                        for (int v = 0; v < V; ++v)
                            store<V>(load<V>(g + p * W, v, dim - p * W), packed.data() + (p * kBlock + r) * W, v, W);
                    for (int64_t n = 0; n < dim; ++n) sum_bias[k * dim + n] += g[n];
                }
                const int64_t before = s.slots(i - 1);
                for (int64_t tap = std::max<int64_t>(0, j - before + 1); tap <= std::min(j, s.expansion); ++tap)
                    for (int64_t source = 0; source < s.sources; ++source)
                        for (int64_t c = 0; c < s.kernel; ++c) {
                            const int64_t slots = s.level[i - 1].slot * s.child_slot(i - 1, j - tap, k, source);
                            for (int64_t r = 0; r < rows; ++r) {
                                const int64_t child = block.child(c)[r];
                                x[r] = child < 0 ? zeros.data() : below + (child + slots) * dim;
                            }
                            T* into = sum + (s.matrix(tap, k, source) * length + c * dim) * padded;
                            for (int64_t p = 0; p < panels.count(); ++p) {
                                const T* g = packed.data() + p * kBlock * W;
                                int64_t d = 0;
                                for (; d + kRows <= dim; d += kRows)
                                    outer<kRows, V>(x, d, rows, g, into + d * padded + p * W, padded);
                                for (; d < dim; ++d) outer<1, V>(x, d, rows, g, into + d * padded + p * W, padded);
                            }
                        }
            }
        }
    }
}

// grad (of the nodes) and grad_leaves hold what reaches them otherwise and are completed in place.
template <typename T, int V>
void backward(const Tree& s, const T* leaves, const T* taps, const T* nodes, T* grad, T* grad_leaves, T* grad_taps,
              T* grad_bias) {
    const Panels<T, V> panels{s.dim};
    const int64_t dim = s.dim, length = s.kernel * dim, padded = panels.count() * panels.width;
    std::vector<T> packed(s.matrices() * length * padded);
    for (int64_t m = 0; m < s.matrices() * s.kernel; ++m)  // transposed, child by child
        panels.pack(taps + m * dim * dim, dim, 1, dim, packed.data() + m * dim * padded);
    for (int64_t i = s.levels; i > 0; --i)
        for (int64_t from = 0; from < s.kernel; from += s.arity)
            to_children<T, V>(s, i, from, std::min(s.kernel, from + s.arity), packed.data(), grad,
                              i == 1 ? grad_leaves : grad);
    int64_t rows = 0;
    for (int64_t i = 1; i <= s.levels; ++i) rows += s.rows(i) * s.slots(i);
    const int64_t size = s.matrices() * length * padded, biases = s.banks * dim;
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>({16, rows / 256, kPartial / size}));
    std::vector<T> sums(shares * (size + biases), T(0));
#pragma omp parallel for schedule(static) if (rows * size > kShared)
    for (int64_t share = 0; share < shares; ++share) {
        T* sum = sums.data() + share * (size + biases);
        to_weights<T, V>(s, share, shares, leaves, nodes, grad, sum, sum + size);
    }
    for (int64_t share = 1; share < shares; ++share)
        for (int64_t n = 0; n < size + biases; ++n) sums[n] += sums[share * (size + biases) + n];
    for (int64_t m = 0; m < s.matrices() * length; ++m) std::copy_n(sums.data() + m * padded, dim, grad_taps + m * dim);
    std::copy_n(sums.data() + size, biases, grad_bias);
}

Tree make_tree(const int64_t* sizes, const int64_t* levels, const int64_t* index) {
    Tree s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], {}};
    for (int64_t i = 0; i <= s.levels; ++i) {
        const int64_t* l = levels + 8 * i;
        s.level.push_back({l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7], nullptr});
        if (index && i > 0) {
            s.level[i].index = index;
            index += s.rows(i) * s.kernel;
        }
    }
    return s;
}

// Narrow vectors leave no half of a panel empty.
template <typename T, typename F>
void by_width(int64_t dim, F call) {
    if (dim <= VectorOf<T>::lanes) return call(std::integral_constant<int, 1>{});
    call(std::integral_constant<int, 2>{});
}

}  // namespace

#define EXPORT(NAME, T)                                                                                             \
    extern "C" void tree_build_forward_##NAME(const int64_t* sizes, const int64_t* levels, const int64_t* index,    \
                                              const T* leaves, const T* taps, const T* bias, T* nodes) {            \
        const Tree s = make_tree(sizes, levels, index);                                                             \
        by_width<T>(s.dim, [&](auto v) { forward<T, v()>(s, leaves, taps, bias, nodes); });                         \
    }                                                                                                               \
    extern "C" void tree_build_backward_##NAME(const int64_t* sizes, const int64_t* levels, const int64_t* index,   \
                                               const T* leaves, const T* taps, const T* nodes, T* grad,             \
                                               T* grad_leaves, T* grad_taps, T* grad_bias) {                        \
        const Tree s = make_tree(sizes, levels, index);                                                             \
        by_width<T>(s.dim, [&](auto v) {                                                                            \
            backward<T, v()>(s, leaves, taps, nodes, grad, grad_leaves, grad_taps, grad_bias);                      \
        });                                                                                                         \
    }

EXPORT(float32, float)
EXPORT(float64, double)
