// Deformable attention's core on CPUs, for one (image, head) at a time per thread: scores, bias and softmax of a block of
// query rows stay in the L2 cache. Scores are key-major, [key][query], so that a key's bias is written in order.
//
// Where many keys and queries meet, keys come in tiles, and sums and highest scores are carried from tile to tile.
//
// Bias of a key: along x, every table row it needs is blended with three weights per query column (two of them nonzero;
// three because the step between columns is one cell or hardly less, so the first tap is column or column - 1 from the start).
// Where the table is stretched over another map, each query column looks up its two entries instead (Spread); few rows of such a
// table serve many rows of queries. Along y, two blended rows make a row of the bias; a vector of columns goes down all rows, the two blended rows of the
// moment in registers. Compiled by dattrain/ops/cpp/build.py; called by deformable_attention/backend_native.py.

#include "products.h"
#include "stretched.h"

namespace {

inline V<float> truncated(V<float> x) { return __builtin_convertvector(__builtin_convertvector(x, Int), V<float>); }
inline V<double> truncated(V<double> x) {
    typedef int64_t Long __attribute__((vector_size(64)));
    return __builtin_convertvector(__builtin_convertvector(x, Long), V<double>);
}
// For what fits an int32.
template <class T> inline V<T> floored(V<T> x) {
    const V<T> t = truncated(x);
    return t > x ? t - 1 : t;
}
template <class T> inline V<T> counting() {
    V<T> n{};
    for (int i = 0; i < lanes<T>; ++i) n[i] = T(i);
    return n;
}

// The lanes of b moved up by BY; those of a come in below.
#if defined(__clang__)
template <int BY> inline V<float> moved(V<float> a, V<float> b) {
    return __builtin_shufflevector(a, b, 16 - BY, 17 - BY, 18 - BY, 19 - BY, 20 - BY, 21 - BY, 22 - BY, 23 - BY, 24 - BY,
                                   25 - BY, 26 - BY, 27 - BY, 28 - BY, 29 - BY, 30 - BY, 31 - BY);
}
template <int BY> inline V<double> moved(V<double> a, V<double> b) {
    return __builtin_shufflevector(a, b, 8 - BY, 9 - BY, 10 - BY, 11 - BY, 12 - BY, 13 - BY, 14 - BY, 15 - BY);
}
#else
template <int BY> inline V<float> moved(V<float> a, V<float> b) {
    return __builtin_shuffle(a, b, Int{16 - BY, 17 - BY, 18 - BY, 19 - BY, 20 - BY, 21 - BY, 22 - BY, 23 - BY, 24 - BY,
                                       25 - BY, 26 - BY, 27 - BY, 28 - BY, 29 - BY, 30 - BY, 31 - BY});
}
template <int BY> inline V<double> moved(V<double> a, V<double> b) {
    typedef int64_t Long __attribute__((vector_size(64)));
    return __builtin_shuffle(a, b, Long{8 - BY, 9 - BY, 10 - BY, 11 - BY, 12 - BY, 13 - BY, 14 - BY, 15 - BY});
}
#endif

// S is what q, k, v, out and their gradients are in memory, T what is computed with and what the rest is.
template <class T, class S> struct Call {
    const S *q, *k, *v, *grad_out, *out_in;
    const T *positions, *table, *lse_in;
    S *out, *grad_q, *grad_k, *grad_v;
    T *lse, *grad_positions;
    const int64_t* strides;  // (image, head, row) of q, k, v, out, grad_out, grad_q, grad_k, grad_v
    int64_t batch, heads, groups, height, width, keys, dim, table_height, table_width;
    T origin_y, slope_y, step_y, origin_x, slope_x, step_x, scale;
    template <class P> P* at(P* x, int which, int64_t image, int64_t head) const {
        return x + image * strides[3 * which] + head * strides[3 * which + 1];
    }
};

template <class T, class S> struct Worker {
    static constexpr int L = lanes<T>;
    static constexpr int64_t in_cache = int64_t(1 << 18) / int64_t(sizeof(T));  // scores of a block
    const Call<T, S>& c;
    const bool stretched;  // query columns step by something else than a table cell
    const bool tiled;
    const int64_t queries, dim, row, margin, pitch, block_rows, block, tile;
    std::vector<T> scores, grads, padded, grad_padded, weights, slopes, tops, fractions, line, column_sum, acc_k, acc_v, acc_q, delta, inside, shrink;
    std::vector<Columns<T>> entries;
    Dot<T, S> dot;
    Weighted<T, S> weighted;

    Worker(const Call<T, S>& call, bool backward)
        : c(call), stretched(call.step_x > 1 || (1 - call.step_x) * T(call.width - 1) > 1), tiled(call.keys * call.width > in_cache / 4),
          queries(call.height * call.width), dim(round_up(call.dim, L)), row(round_up(call.width, L)), margin(call.width + 2 * L + 8),
          pitch(call.table_width + 2 * margin),
          block_rows(std::max<int64_t>(1, std::min(call.height, tiled ? 640 / call.width : in_cache / (call.keys * call.width)))),
          block(round_up(block_rows * call.width, L)), tile(tiled ? std::min(call.keys, std::max<int64_t>(12, in_cache / block)) : call.keys) {
        scores.resize(tile * block + row + L);
        acc_q.resize(block * dim);
        line.resize(block);
        column_sum.resize(block);
        shrink.resize(block);
        weights.resize(3 * row);
        tops.resize(round_up(block_rows, L));
        fractions.resize(round_up(block_rows, L));
        inside.resize(row);
        entries.resize(row / L);
        std::fill(inside.begin(), inside.begin() + c.width, T(1));
        if (c.table) padded.assign(c.table_height * pitch + row + 2 * L, 0);
        if (!backward) return;
        grads.resize(tile * block + row + L);
        acc_k.resize(c.keys * dim);
        acc_v.resize(c.keys * dim);
        delta.resize(block);
        slopes.resize(3 * row);
        if (c.table) grad_padded.assign(c.heads * c.table_height * pitch + row + 2 * L, 0);
    }

    const T* position(int64_t image, int64_t head, int64_t key) const {
        return c.positions + ((image * c.groups + head / (c.heads / c.groups)) * c.keys + key) * 2;
    }
    void load_table(int64_t head) {
        for (int64_t y = 0; y < c.table_height; ++y)
            for (int64_t x = 0; x < c.table_width; ++x) padded[y * pitch + margin + x] = c.table[(head * c.table_height + y) * c.table_width + x] / c.scale;
    }

    // The three weights of every query column, and which table column the first of them is for at query column 0.
    int64_t columns_of(T x, bool with_slopes) {
        const T start = c.origin_x + c.slope_x * x;
        T whole = std::floor(start);
        const T shift = start - whole;
        whole = whole < -T(c.width + 4) ? -T(c.width + 4) : whole > T(c.table_width + 2) ? T(c.table_width + 2) : whole;
        const V<T> zero{}, one = zero + 1;
        for (int64_t i = 0; i < row; i += L) {
            const V<T> column = counting<T>() + T(i);
            const V<T> at = shift + column * c.step_x - column;  // in [-1, 1): table column minus (whole + i)
            const V<T> fraction = at < 0 ? at + 1 : at;
            store(weights.data() + i, at < 0 ? 1 - fraction : zero);
            store(weights.data() + row + i, at < 0 ? fraction : 1 - fraction);
            store(weights.data() + 2 * row + i, at < 0 ? zero : fraction);
            if (with_slopes) {
                store(slopes.data() + i, at < 0 ? -one : zero);
                store(slopes.data() + row + i, at < 0 ? one : -one);
                store(slopes.data() + 2 * row + i, at < 0 ? zero : one);
            }
        }
        return whole == whole ? int64_t(whole) - 1 : -c.width - 4;
    }
    // The two entries of every query column; outside the table both are in its zeros.
    void entries_of(T x) {
        const T start = c.origin_x + c.slope_x * x;
        const V<T> low = V<T>{} - 2, high = V<T>{} + T(c.table_width);
        for (int64_t i = 0; i < row; i += L) {
            V<T> at = start + (counting<T>() + T(i)) * c.step_x;
            at = at < low ? low : at > high ? high : at;
            entries[i / L].set(at, floored<T>(at));
        }
    }
    // Upper table row and fraction of every query row; false where all of them are outside the table.
    bool rows_of(T start, int64_t rows) {
        const T last = start + (rows - 1) * c.step_y;
        if (!(start < T(c.table_height)) || !(last >= -1)) return false;
        for (int64_t y = 0; y < rows; y += L) {
            const V<T> at = start + (counting<T>() + T(y)) * c.step_y;
            // Far outside it does not matter where.
            const V<T> low = at < -3 ? V<T>{} - 3 : at, floor = floored<T>(low);
            store(tops.data() + y, floor);
            store(fractions.data() + y, low - floor);
        }
        return true;
    }

    // A vector of table row ``y`` blended along x; rows outside the table are zero.
    struct Taps {
        V<T> by[3];
        const T* first;
        int64_t pitch, height;
        V<T> operator()(int64_t y) const {
            if (y < 0 || y >= height) return V<T>{};
            const T* t = first + y * pitch;
            return by[0] * load(t) + by[1] * load(t + 1) + by[2] * load(t + 2);
        }
    };
    // The same of a stretched table.
    struct Spread {
        const Columns<T>& columns;
        const T* first;
        int64_t pitch, height;
        V<T> operator()(int64_t y) const { return y < 0 || y >= height ? V<T>{} : columns.blend(first + y * pitch); }
        V<T> slope(int64_t y) const { return columns.slope(first + y * pitch); }
        void add(T* table, int64_t y, V<T> g) const { columns.add(table + y * pitch, g); }
    };
    Spread spread(int64_t i) const { return {entries[i / L], padded.data() + margin, pitch, c.table_height}; }
    Taps taps(const std::vector<T>& by, int64_t x, int64_t i) const {
        return {{load(by.data() + i), load(by.data() + row + i), load(by.data() + 2 * row + i)}, padded.data() + margin + x + i, pitch, c.table_height};
    }

    // Query rows that share two table rows share the two blended ones.
    template <class Blend> void down_rows(const Blend& blend, T* into, int64_t rows) const {
        int64_t top = int64_t(tops[0]);
        V<T> upper = blend(top), lower = blend(top + 1);
        for (int64_t y = 0; y < rows; ++y) {
            const int64_t next = int64_t(tops[y]);
            if (next != top) {
                upper = next == top + 1 ? lower : blend(next);
                lower = blend(next + 1);
                top = next;
            }
            store(into + y * c.width, upper + fractions[y] * (lower - upper));
        }
    }

    void bias(int64_t image, int64_t head, int64_t first_row, int64_t rows, int64_t first_key, int64_t keys) {
        for (int64_t key = 0; key < keys; ++key) {
            const T* p = position(image, head, first_key + key);
            T* into = scores.data() + key * block;
            const T start = c.origin_y + c.slope_y * p[0] + first_row * c.step_y;
            const T broken = (start - start) + (p[1] - p[1]);  // not a number where one of them is not finite
            if (broken != 0) {
                std::fill(into, into + rows * c.width, broken);
                continue;
            }
            if (!rows_of(start, rows)) {
                std::fill(into, into + rows * c.width, T(0));
                continue;
            }
            // From the right: a vector that reaches past its row spoils what is written next.
            if (stretched) {
                entries_of(p[1]);
                for (int64_t i = row - L; i >= 0; i -= L) down_rows(spread(i), into + i, rows);
            } else {
                const int64_t x = columns_of(p[1], false);
                for (int64_t i = row - L; i >= 0; i -= L) down_rows(taps(weights, x, i), into + i, rows);
            }
        }
    }

    // Scores of the block's queries and the tile's keys before they are scaled, bias included.
    void block_scores(int64_t image, int64_t head, int64_t first_row, int64_t rows, int64_t first_key, int64_t keys) {
        const int64_t count = rows * c.width, columns = round_up(count, L);
        const S *k = c.at(c.k, 1, image, head) + first_key * c.strides[5], *q = c.at(c.q, 0, image, head) + first_row * c.width * c.strides[2];
        if (c.table) {
            bias(image, head, first_row, rows, first_key, keys);
            for (int64_t key = 0; key < keys; ++key)
                std::fill(scores.data() + key * block + count, scores.data() + key * block + columns, T(0));
            dot.template operator()<true>(keys, k, c.strides[5], count, q, c.strides[2], c.dim, scores.data(), block);
        } else {
            dot.template operator()<false>(keys, k, c.strides[5], count, q, c.strides[2], c.dim, scores.data(), block);
        }
    }

    void forward(int64_t image, int64_t head) {
        const S* v = c.at(c.v, 2, image, head);
        if (c.table) load_table(head);
        for (int64_t first = 0; first < c.height; first += block_rows) {
            const int64_t rows = std::min(block_rows, c.height - first), count = rows * c.width, columns = round_up(count, L);
            for (int64_t key = 0; key < c.keys; key += tile) {
                const int64_t keys = std::min(tile, c.keys - key);
                block_scores(image, head, first, rows, key, keys);
                if (key == 0) {
                    exponentials(scores.data(), keys, columns, block, c.scale, line.data(), column_sum.data());
                    weighted.template operator()<false>(count, scores.data(), 1, block, keys, v, c.strides[8], c.dim, acc_q.data());
                    continue;
                }
                more_exponentials(scores.data(), keys, columns, block, c.scale, line.data(), column_sum.data(), shrink.data());
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t d = 0; d < dim; d += L) store(acc_q.data() + i * dim + d, load(acc_q.data() + i * dim + d) * shrink[i]);
                weighted.template operator()<true>(count, scores.data(), 1, block, keys, v + key * c.strides[8], c.strides[8], c.dim, acc_q.data());
            }
            S* out = c.at(c.out, 3, image, head) + first * c.width * c.strides[11];
            T* lse = c.lse + (image * c.heads + head) * queries + first * c.width;
            for (int64_t i = 0; i < count; ++i) {
                narrow_all(acc_q.data() + i * dim, c.dim, 1 / column_sum[i], out + i * c.strides[11]);
                lse[i] = line[i] * c.scale + std::log(column_sum[i]);
            }
        }
    }

    void backward(int64_t image, int64_t head) {
        const S* k = c.at(c.k, 1, image, head);
        if (c.table) load_table(head);
        std::fill(acc_k.begin(), acc_k.end(), T(0));
        std::fill(acc_v.begin(), acc_v.end(), T(0));
        for (int64_t first = 0; first < c.height; first += block_rows) {
            const int64_t rows = std::min(block_rows, c.height - first), count = rows * c.width, columns = round_up(count, L);
            const S* grad_out = c.at(c.grad_out, 4, image, head) + first * c.width * c.strides[14];
            const S* q = c.at(c.q, 0, image, head) + first * c.width * c.strides[2];
            const S* out = c.at(c.out_in, 3, image, head) + first * c.width * c.strides[11];
            const T* lse = c.lse_in + (image * c.heads + head) * queries + first * c.width;
            std::fill(std::copy(lse, lse + count, line.begin()), line.end(), T(0));
            std::fill(delta.begin() + count, delta.end(), T(0));
            row_products(grad_out, c.strides[14], out, c.strides[11], count, c.dim, delta.data());
            for (int64_t key = 0; key < c.keys; key += tile) {
                const int64_t keys = std::min(tile, c.keys - key);
                block_scores(image, head, first, rows, key, keys);
                dot.template operator()<false>(keys, c.at(c.v, 2, image, head) + key * c.strides[8], c.strides[8], count, grad_out, c.strides[14], c.dim, grads.data(), block);
                for (int64_t i = 0; i < keys; ++i)
                    for (int64_t n = 0; n < columns; n += L) {
                        const V<T> weight = exponential(load(scores.data() + i * block + n) * c.scale - load(line.data() + n));
                        store(scores.data() + i * block + n, weight);
                        T* g = grads.data() + i * block + n;
                        store(g, weight * (load(g) - load(delta.data() + n)));
                    }
                weighted.template operator()<true>(keys, scores.data(), block, 1, count, grad_out, c.strides[14], c.dim, acc_v.data() + key * dim);
                weighted.template operator()<true>(keys, grads.data(), block, 1, count, q, c.strides[2], c.dim, acc_k.data() + key * dim);
                if (key == 0) weighted.template operator()<false>(count, grads.data(), 1, block, keys, k, c.strides[5], c.dim, acc_q.data());
                else weighted.template operator()<true>(count, grads.data(), 1, block, keys, k + key * c.strides[5], c.strides[5], c.dim, acc_q.data());
                if (c.table) bias_gradient(image, head, first, rows, key, keys);
            }
            S* grad_q = c.at(c.grad_q, 5, image, head) + first * c.width * c.strides[17];
            for (int64_t i = 0; i < count; ++i) narrow_all(acc_q.data() + i * dim, c.dim, c.scale, grad_q + i * c.strides[17]);
        }
        S* grad_k = c.at(c.grad_k, 6, image, head);
        S* grad_v = c.at(c.grad_v, 7, image, head);
        for (int64_t i = 0; i < c.keys; ++i) {
            narrow_all(acc_k.data() + i * dim, c.dim, c.scale, grad_k + i * c.strides[20]);
            narrow_all(acc_v.data() + i * dim, c.dim, T(1), grad_v + i * c.strides[23]);
        }
    }

    // The gradient of what down_rows wrote: ``finish(y, g)`` gets that of the blended table row y once all query rows that read it have
    // been seen. Returns the sums of the gradient along y.
    template <class Blend, class Finish> V<T> up_rows(const Blend& blend, const T* source, int64_t rows, bool whole, V<T> mask, const Finish& finish) const {
        V<T> sum_y{};
        int64_t top = int64_t(tops[0]);
        V<T> upper = blend(top), lower = blend(top + 1), grad_upper{}, grad_lower{};
        for (int64_t y = 0; y < rows; ++y) {
            const int64_t next = int64_t(tops[y]);
            if (next != top) {
                finish(top, grad_upper);
                if (next == top + 1) {
                    upper = lower;
                    grad_upper = grad_lower;
                } else {
                    finish(top + 1, grad_lower);
                    upper = blend(next);
                    grad_upper = V<T>{};
                }
                lower = blend(next + 1);
                grad_lower = V<T>{};
                top = next;
            }
            // Lanes past the last query column belong to another row.
            V<T> g = load(source + y * c.width);
            if (!whole) g = mask > 0 ? g : V<T>{};
            sum_y += g * (lower - upper);
            grad_upper += (1 - fractions[y]) * g;
            grad_lower += fractions[y] * g;
        }
        finish(top, grad_upper);
        finish(top + 1, grad_lower);
        return sum_y;
    }

    // The gradient of the tile's bias (grads) to the table's and the positions': bias() turned round.
    void bias_gradient(int64_t image, int64_t head, int64_t first_row, int64_t rows, int64_t first_key, int64_t keys) {
        T* into = c.grad_positions + ((image * c.heads + head) * c.keys + first_key) * 2;
        T* table = grad_padded.data() + head * c.table_height * pitch + margin;
        for (int64_t key = 0; key < keys; ++key) {
            const T* p = position(image, head, first_key + key);
            const T* source = grads.data() + key * block;
            const T start = c.origin_y + c.slope_y * p[0] + first_row * c.step_y;
            const T broken = (start - start) + (p[1] - p[1]);
            if (broken != 0) {
                into[2 * key] = into[2 * key + 1] = broken;
                continue;
            }
            if (!rows_of(start, rows)) continue;
            const int64_t x = stretched ? 0 : columns_of(p[1], true);
            if (stretched) entries_of(p[1]);
            V<T> sum_y{}, sum_x{};
            for (int64_t i = 0; i < row; i += L) {
                const bool whole = i + L <= c.width;
                const V<T> mask = load(inside.data() + i);
                if (stretched) {
                    const Spread blend = spread(i);
                    sum_y += up_rows(blend, source + i, rows, whole, mask, [&](int64_t y, V<T> g) {
                        if (y < 0 || y >= c.table_height) return;
                        sum_x += g * blend.slope(y);
                        blend.add(table, y, g);
                    });
                    continue;
                }
                const Taps blend = taps(weights, x, i), slope = taps(slopes, x, i);
                const bool spills = c.width - i > L - 2;
                sum_y += up_rows(blend, source + i, rows, whole, mask, [&](int64_t y, V<T> g) {
                    if (y < 0 || y >= c.table_height) return;
                    sum_x += g * slope(y);
                    const V<T> zero{}, second = blend.by[1] * g, third = blend.by[2] * g;
                    T* t = table + y * pitch + x + i;
                    store(t, load(t) + blend.by[0] * g + moved<1>(zero, second) + moved<2>(zero, third));
                    if (spills) store(t + L, load(t + L) + moved<1>(second, zero) + moved<2>(third, zero));
                });
            }
            T along_y = 0, along_x = 0;
            for (int i = 0; i < L; ++i) { along_y += sum_y[i]; along_x += sum_x[i]; }
            into[2 * key] += along_y * c.slope_y * c.scale;
            into[2 * key + 1] += along_x * c.slope_x * c.scale;
        }
    }
};

template <class T, class S> void run(const Call<T, S>& call, bool backward, int64_t threads, T* grad_tables) {
    const int64_t items = call.batch * call.heads;
    threads = std::max<int64_t>(1, std::min(threads, items));
    on_threads(threads, [&](int64_t thread) {
        Worker<T, S> worker(call, backward);
        // Head by head, so that a thread keeps its table.
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item) {
            const int64_t head = item / call.batch, image = item % call.batch;
            if (backward) worker.backward(image, head);
            else worker.forward(image, head);
        }
        if (backward && call.table)
            for (int64_t line = 0; line < call.heads * call.table_height; ++line)
                std::memcpy(grad_tables + (thread * call.heads * call.table_height + line) * call.table_width,
                            worker.grad_padded.data() + line * worker.pitch + worker.margin, call.table_width * sizeof(T));
    });
}

template <class T, class S>
int call(void** p, const int64_t* strides, const int64_t* sizes, const double* numbers, int64_t backward, int64_t threads) try {
    Call<T, S> c{};
    c.q = (const S*)p[0]; c.k = (const S*)p[1]; c.v = (const S*)p[2]; c.positions = (const T*)p[3]; c.table = (const T*)p[4];
    c.out = (S*)p[5]; c.out_in = (const S*)p[5]; c.lse = (T*)p[6]; c.lse_in = (const T*)p[6]; c.grad_out = (const S*)p[7];
    c.grad_q = (S*)p[8]; c.grad_k = (S*)p[9]; c.grad_v = (S*)p[10]; c.grad_positions = (T*)p[11];
    c.strides = strides;
    c.batch = sizes[0]; c.heads = sizes[1]; c.groups = sizes[2]; c.height = sizes[3]; c.width = sizes[4]; c.keys = sizes[5];
    c.dim = sizes[6]; c.table_height = sizes[7]; c.table_width = sizes[8];
    c.origin_y = numbers[0]; c.slope_y = numbers[1]; c.step_y = numbers[2];
    c.origin_x = numbers[3]; c.slope_x = numbers[4]; c.step_x = numbers[5]; c.scale = numbers[6];
    run<T, S>(c, backward != 0, threads, (T*)p[12]);
    return 0;
} catch (...) {
    return 1;
}

}  // namespace

extern "C" {
// Whether products of bf16 are the tile unit's.
int dattrain_tile_unit() {
#ifdef DATTRAIN_TILES
    return TileUnit::usable();
#else
    return 0;
#endif
}
int dattrain_core_f32(void** p, const int64_t* s, const int64_t* n, const double* x, int64_t b, int64_t t) { return call<float, float>(p, s, n, x, b, t); }
int dattrain_core_f64(void** p, const int64_t* s, const int64_t* n, const double* x, int64_t b, int64_t t) { return call<double, double>(p, s, n, x, b, t); }
int dattrain_core_bf16(void** p, const int64_t* s, const int64_t* n, const double* x, int64_t b, int64_t t) { return call<float, bf16>(p, s, n, x, b, t); }
}
