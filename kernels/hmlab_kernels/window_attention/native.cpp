// Window attention on the CPU: a tile of queries reads the keys between its first window's start and its last query.
#include "_tile.hpp"

namespace {

using namespace tile;

struct Shape {  // bounds are of packed tokens; strides in numbers, of a token and of a head
    int64_t sequences, heads, kv_heads, dim, window, sinks, segment, separate;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    const int64_t *queries, *keys, *start;

    // The first position that a query at position p sees, sinks apart.
    int64_t begin(int64_t p) const { return std::max<int64_t>(p - window + 1, 0) / segment * segment; }
};

struct Sequence {
    int64_t query, queries, key, keys, apart, first, sinks, position;
    Sequence(const Shape& s, int64_t n)
        : query(s.queries[n]), queries(s.queries[n + 1] - query), key(s.keys[n]), keys(s.keys[n + 1] - key),
          apart(s.separate ? s.sinks : 0), first(s.separate ? s.start[n] : 0),
          sinks(std::min(s.sinks, keys)), position(first + keys - apart - queries) {}
    int64_t row(int64_t p) const { return key + apart + p - first; }  // of the key at position p
};

struct Item {
    int64_t sequence, head, begin, n;
};

// Tiles of `count(sequence)` things, `lanes` at a time, for every head.
template <typename Count>
std::vector<Item> tiles(const Shape& s, int64_t heads, int64_t lanes, Count count) {
    std::vector<Item> items;
    for (int64_t n = 0; n < s.sequences; ++n)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0, all = count(Sequence(s, n)); i < all; i += lanes)
                items.push_back({n, h, i, std::min(lanes, all - i)});
    return items;
}

// Calls take(rows) with every chunk of keys that the queries at positions p .. p + n - 1 see.
template <typename T, typename Take>
void keys_of(const Shape& s, const Sequence& of, int64_t p, int n, const T* k, const T* v, Rows<T>& rows, Take take) {
    int from = 0;
    for (int64_t x = 0; x < std::min(of.sinks, s.begin(p + n - 1)); ++x) {
        while (s.begin(p + from) <= x) ++from;
        rows.add(k + (of.key + x) * s.k_token, v + (of.key + x) * s.v_token, T(0), from, n);
        if (rows.full()) take(rows);
    }
    int to = 0;
    for (int64_t x = std::max({s.begin(p), of.first, int64_t(0)}); x < p + n; ++x) {
        while (to < n && s.begin(p + to) <= x) ++to;
        const int64_t row = of.row(x);
        rows.add(k + row * s.k_token, v + row * s.v_token, T(0), int(std::max<int64_t>(x - p, 0)), to);
        if (rows.full()) take(rows);
    }
    if (rows.n) take(rows);
}

template <typename T>
void forward(const Shape& s, const T* q, const T* k, const T* v, T scale, T* out, T* lse) {
    constexpr int L = kLanes<T>;
    const std::vector<Item> items = tiles(s, s.heads, L, [](const Sequence& of) { return of.queries; });
#pragma omp parallel
    {
        std::vector<T> memory(2 * s.dim * L + kAlign);
        T* qt = aligned(memory);
        T* sums = qt + s.dim * L;
        alignas(64) T top[L], total[L];
        Scratch<T> scratch;
        Rows<T> rows;
#pragma omp for schedule(dynamic, 8)
        for (size_t i = 0; i < items.size(); ++i) {
            const Item item = items[i];
            const Sequence of(s, item.sequence);
            const int n = int(item.n);
            const int64_t h = item.head, g = h / (s.heads / s.kv_heads), token = of.query + item.begin;
            const T* row[L];
            for (int j = 0; j < n; ++j) row[j] = q + (token + j) * s.q_token + h * s.q_head;
            transpose(row, n, s.dim, qt);
            std::fill_n(sums, s.dim * L, T(0));
            std::fill_n(total, L, T(0));
            std::fill_n(top, L, -std::numeric_limits<T>::infinity());
            keys_of(s, of, of.position + item.begin, n, k + g * s.k_head, v + g * s.v_head, rows,
                    [&](Rows<T>& r) { attend(qt, r, s.dim, scratch, scale, top, total, sums); });
            for (int j = 0; j < n; ++j) {
                const T share = total[j] > 0 ? 1 / total[j] : 0;
                T* y = out + ((token + j) * s.heads + h) * s.dim;
                for (int64_t d = 0; d < s.dim; ++d) y[d] = sums[d * L + j] * share;
                lse[(token + j) * s.heads + h] = top[j] + std::log(total[j]);
            }
        }
    }
}

template <typename T>
void backward(const Shape& s, const T* q, const T* k, const T* v, T scale, const T* lse, const T* delta, const T* g,
              T* dq, T* dk, T* dv) {
    constexpr int L = kLanes<T>;
    const int64_t D = s.dim, group = s.heads / s.kv_heads;
    const std::vector<Item> by_query = tiles(s, s.heads, L, [](const Sequence& of) { return of.queries; });
    // The keys of a window in tiles of their own, then the sinks, which may be the same keys and are added after.
    const std::vector<Item> by_key = tiles(s, s.kv_heads, L, [](const Sequence& of) { return of.keys - of.apart; });
    const std::vector<Item> by_sink = tiles(s, s.kv_heads, L, [](const Sequence& of) {
        return of.queries ? of.sinks : int64_t(0);
    });
#pragma omp parallel
    {
        std::vector<T> memory(4 * D * L + kAlign);
        T* xt = aligned(memory);
        T *yt = xt + D * L, *dx = yt + D * L, *dy = dx + D * L;
        alignas(64) T lane_lse[L], lane_delta[L];
        Scratch<T> w;
        Rows<T> rows;
        const T *x[L], *y[L];
#pragma omp for schedule(dynamic, 8) nowait
        for (size_t i = 0; i < by_query.size(); ++i) {
            const Item item = by_query[i];
            const Sequence of(s, item.sequence);
            const int n = int(item.n);
            const int64_t h = item.head, kv = h / group, token = of.query + item.begin;
            std::fill_n(lane_lse, L, T(0));
            std::fill_n(lane_delta, L, T(0));
            for (int j = 0; j < n; ++j) {
                const int64_t at_head = (token + j) * s.heads + h;
                x[j] = q + (token + j) * s.q_token + h * s.q_head;
                y[j] = g + at_head * D;
                lane_lse[j] = std::isfinite(lse[at_head]) ? lse[at_head] : T(0);
                lane_delta[j] = delta[at_head];
            }
            transpose(x, n, D, xt);
            transpose(y, n, D, yt);
            std::fill_n(dx, D * L, T(0));
            keys_of(s, of, of.position + item.begin, n, k + kv * s.k_head, v + kv * s.v_head, rows, [&](Rows<T>& r) {
                weights(xt, yt, r, D, w, scale, lane_lse, lane_delta);
                accumulate(w.s, r.x, r.n, D, dx);
                r.n = 0;
            });
            for (int j = 0; j < n; ++j)
                for (int64_t d = 0; d < D; ++d) dq[((token + j) * s.heads + h) * D + d] = scale * dx[d * L + j];
        }
        // A tile of keys: those at positions `first` on (or the sinks), read by the queries at positions from .. to - 1.
        const auto keys_read = [&](const Item& item, int64_t row, auto sees, int64_t from, int64_t to, bool add) {
            const Sequence of(s, item.sequence);
            const int n = int(item.n);
            for (int j = 0; j < n; ++j) {
                x[j] = k + (row + j) * s.k_token + item.head * s.k_head;
                y[j] = v + (row + j) * s.v_token + item.head * s.v_head;
            }
            transpose(x, n, D, xt);
            transpose(y, n, D, yt);
            std::fill_n(dx, 2 * D * L, T(0));
            const auto take = [&](Rows<T>& r) {
                weights(xt, yt, r, D, w, scale, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr));
                accumulate(w.p, r.y, r.n, D, dy);
                accumulate(w.s, r.x, r.n, D, dx);
                r.n = 0;
            };
            for (int64_t p = std::max(from, of.position); p < std::min(to, of.position + of.queries); ++p)
                for (int64_t h = item.head * group; h < (item.head + 1) * group; ++h) {
                    const int64_t token = of.query + p - of.position, at_head = token * s.heads + h;
                    const auto [first, last] = sees(p, n);
                    if (std::isfinite(lse[at_head]))
                        rows.add(q + token * s.q_token + h * s.q_head, g + at_head * D, -lse[at_head], first, last,
                                 delta[at_head]);
                    if (rows.full()) take(rows);
                }
            if (rows.n) take(rows);
            for (int j = 0; j < n; ++j) {
                T* to_k = dk + ((row + j) * s.kv_heads + item.head) * D;
                T* to_v = dv + ((row + j) * s.kv_heads + item.head) * D;
                for (int64_t d = 0; d < D; ++d) {
                    to_k[d] = scale * dx[d * L + j] + (add ? to_k[d] : T(0));
                    to_v[d] = dy[d * L + j] + (add ? to_v[d] : T(0));
                }
            }
        };
        struct Span { int first, last; };
#pragma omp for schedule(dynamic, 8)
        for (size_t i = 0; i < by_key.size(); ++i) {
            const Sequence of(s, by_key[i].sequence);
            const int64_t at = of.first + by_key[i].begin, end = at + by_key[i].n;
            const auto sees = [&](int64_t p, int n) {
                return Span{int(std::clamp<int64_t>(std::max<int64_t>(s.begin(p), 0) - at, 0, n)),
                            int(std::min<int64_t>(n, p - at + 1))};
            };
            // The last query to see a key at end - 1 has its window's start there or before.
            keys_read(by_key[i], of.row(at), sees, at, end + s.window + s.segment, false);
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < by_sink.size(); ++i) {
            const Item& item = by_sink[i];
            const auto sees = [&](int64_t p, int n) {
                return Span{0, int(std::clamp<int64_t>(s.begin(p) - item.begin, 0, n))};
            };
            const Sequence of(s, item.sequence);
            keys_read(item, of.key + item.begin, sees, item.begin + 1, of.position + of.queries, !s.separate);
        }
    }
}

Shape make_shape(const int64_t* n, const int64_t* queries, const int64_t* keys, const int64_t* start) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], queries, keys, start};
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    extern "C" void window_attention_forward_##NAME(const int64_t* sizes, const int64_t* queries,                    \
                                                    const int64_t* keys, const int64_t* start, const T* q,           \
                                                    const T* k, const T* v, double scale, T* out, T* lse) {          \
        forward<T>(make_shape(sizes, queries, keys, start), q, k, v, T(scale), out, lse);                            \
    }                                                                                                                \
    extern "C" void window_attention_backward_##NAME(const int64_t* sizes, const int64_t* queries,                   \
                                                     const int64_t* keys, const int64_t* start, const T* q,          \
                                                     const T* k, const T* v, double scale, const T* lse,             \
                                                     const T* delta, const T* g, T* dq, T* dk, T* dv) {              \
        backward<T>(make_shape(sizes, queries, keys, start), q, k, v, T(scale), lse, delta, g, dq, dk, dv);          \
    }

EXPORT(float32, float)
EXPORT(float64, double)
