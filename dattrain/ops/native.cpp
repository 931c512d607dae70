// Deformable attention's core on CPUs, for one (image, head) at a time per thread: scores, bias and softmax of a block of
// query rows stay in the L2 cache. Scores are key-major, [key][query], so that a key's bias is written in order.
//
// Bias of a key: along x, every table row it needs is blended with three weights per query column (two of them nonzero;
// three because the step between columns is at most one cell, so the first tap is column or column - 1 from the start).
// Along y, two blended rows make a row of the bias. Compiled by dattrain/ops/native.py; loaded with ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

template <class T> struct Vector { typedef T type __attribute__((vector_size(64), aligned(sizeof(T)), may_alias)); };
template <class T> using V = typename Vector<T>::type;
template <class T> constexpr int lanes = 64 / sizeof(T);
template <class T> inline V<T> load(const T* p) { return *reinterpret_cast<const V<T>*>(p); }
template <class T> inline void store(T* p, V<T> v) { *reinterpret_cast<V<T>*>(p) = v; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef int32_t Int __attribute__((vector_size(64)));

// exp to about one unit in the last place: 2^n * polynomial(r), |r| <= ln(2) / 2. NaN stays NaN.
inline V<float> exponential(V<float> x) {
    x = x < -87.33654f ? V<float>{} - 87.33654f : x;
    x = x > 88.37626f ? V<float>{} + 88.37626f : x;
    const V<float> shifted = x * 1.44269504f + 12582912.0f;
    const V<float> n = shifted - 12582912.0f;
    const V<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Int power = (__builtin_convertvector(n, Int) + 127) << 23;
    V<float> factor;
    std::memcpy(&factor, &power, sizeof factor);
    return p * factor;
}
inline V<double> exponential(V<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// c[m][n] (+)= sum over p of a[m * am + p * ap] * b[p * ldb + n], for ROWS rows and COLS vectors of columns.
template <class T, int ROWS, int COLS, bool ADD>
inline void tile(int64_t depth, const T* a, int64_t am, int64_t ap, const T* b, int64_t ldb, T* c, int64_t ldc) {
    V<T> sum[ROWS][COLS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) sum[r][j] = ADD ? load(c + r * ldc + j * lanes<T>) : V<T>{};
    for (int64_t p = 0; p < depth; ++p) {
        V<T> right[COLS];
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) right[j] = load(b + p * ldb + j * lanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const V<T> left = V<T>{} + a[r * am + p * ap];
#pragma GCC unroll 4
            for (int j = 0; j < COLS; ++j) sum[r][j] += left * right[j];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) store(c + r * ldc + j * lanes<T>, sum[r][j]);
}

// columns is a multiple of the vector length; all matrices are padded to it.
template <class T, bool ADD>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t am, int64_t ap, const T* b, int64_t ldb, T* c, int64_t ldc) {
    constexpr int L = lanes<T>;
    for (int64_t n = 0; n < columns;) {
        const int64_t left = (columns - n) / L;
        const int width = left >= 4 || left == 2 ? (left >= 4 ? 4 : 2) : (left == 3 ? 2 : 1);
        int64_t m = 0;
        if (width == 4) {
            for (; m + 6 <= rows; m += 6) tile<T, 6, 4, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<T, 1, 4, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        } else if (width == 2) {
            for (; m + 12 <= rows; m += 12) tile<T, 12, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m + 4 <= rows; m += 4) tile<T, 4, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<T, 1, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        } else {
            for (; m + 12 <= rows; m += 12) tile<T, 12, 1, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<T, 1, 1, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        }
        n += width * L;
    }
}

template <class T> struct Call {
    const T *q, *k, *v, *positions, *table, *grad_out, *out_in, *lse_in;
    T *out, *lse, *grad_q, *grad_k, *grad_v, *grad_positions, *grad_table;
    const int64_t* strides;  // (image, head, row) of q, k, v, out, grad_out, grad_q, grad_k, grad_v
    int64_t batch, heads, groups, height, width, keys, dim, table_height, table_width;
    T origin_y, slope_y, step_y, origin_x, slope_x, step_x, scale;
    const T* at(const T* x, int which, int64_t image, int64_t head) const {
        return x + image * strides[3 * which] + head * strides[3 * which + 1];
    }
    T* at(T* x, int which, int64_t image, int64_t head) const {
        return x + image * strides[3 * which] + head * strides[3 * which + 1];
    }
};

template <class T> using Memory = std::vector<T>;

template <class T> struct Worker {
    static constexpr int L = lanes<T>;
    const Call<T>& c;
    const int64_t queries, dim, row, margin, pitch, block_rows, block;
    Memory<T> scores, grads, qt, qs, kk, vv, gg, gt, padded, grad_padded, mixed, grad_mixed, weights, slopes, spread, line, column_sum, acc_k, acc_v, acc_q, delta, inside;

    Worker(const Call<T>& call, bool backward)
        : c(call), queries(call.height * call.width), dim(round_up(call.dim, L)), row(round_up(call.width + 2, L) + L),
          margin(call.width + 2 * L + 8), pitch(call.table_width + 2 * margin),
          block_rows(std::max<int64_t>(1, std::min(call.height, int64_t(1 << 18) / int64_t(sizeof(T)) / (call.keys * call.width) ))),
          block(round_up(block_rows * call.width, L)) {
        scores.resize(c.keys * block + row);
        qt.resize(c.dim * block);
        kk.resize(c.keys * dim);
        vv.resize(c.keys * dim);
        acc_q.resize(block * dim);
        line.resize(block);
        column_sum.resize(block);
        weights.resize(3 * row);
        inside.resize(row);
        std::fill(inside.begin(), inside.begin() + c.width, T(1));
        if (c.table) {
            padded.assign(c.table_height * pitch + 2 * row, 0);
            mixed.resize((c.table_height + 2) * row);
        }
        if (!backward) return;
        grads.resize(c.keys * block + row);
        qs.resize(block * dim);
        gg.resize(block * dim);
        gt.resize(c.dim * block);
        acc_k.resize(c.keys * dim);
        acc_v.resize(c.keys * dim);
        delta.resize(block);
        slopes.resize(3 * row);
        spread.resize(3 * (row + 2 * L));
        if (c.table) {
            grad_mixed.resize((c.table_height + 2) * row);
            grad_padded.assign(c.heads * c.table_height * pitch + 2 * row, 0);
        }
    }

    void pack(const T* from, int64_t stride, int64_t rows, T* into) const {
        for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(into + i * dim, from + i * stride, c.dim * sizeof(T));
            std::fill(into + i * dim + c.dim, into + (i + 1) * dim, T(0));
        }
    }
    void pack_transposed(const T* from, int64_t stride, int64_t rows, T factor, T* into) const {
        for (int64_t d = 0; d < c.dim; ++d) {
            for (int64_t i = 0; i < rows; ++i) into[d * block + i] = from[i * stride + d] * factor;
            std::fill(into + d * block + rows, into + (d + 1) * block, T(0));
        }
    }

    const T* position(int64_t image, int64_t head, int64_t key) const {
        return c.positions + ((image * c.groups + head / (c.heads / c.groups)) * c.keys + key) * 2;
    }
    void load_table(int64_t head) {
        for (int64_t y = 0; y < c.table_height; ++y)
            std::memcpy(padded.data() + y * pitch + margin, c.table + (head * c.table_height + y) * c.table_width, c.table_width * sizeof(T));
    }

    // The three weights of every query column, and which table column the first of them is for at query column 0.
    int64_t columns_of(T x, bool with_slopes) {
        const T start = c.origin_x + c.slope_x * x;
        T whole = std::floor(start);
        const T shift = start - whole;
        whole = whole < -T(c.width + 4) ? -T(c.width + 4) : whole > T(c.table_width + 2) ? T(c.table_width + 2) : whole;
        for (int64_t i = 0; i < c.width; ++i) {
            const T at = shift + i * c.step_x - i;  // in [-1, 1): table column minus (whole + i)
            const bool before = at < 0;
            const T fraction = before ? at + 1 : at;
            weights[i] = before ? 1 - fraction : 0;
            weights[row + i] = before ? fraction : 1 - fraction;
            weights[2 * row + i] = before ? 0 : fraction;
            if (with_slopes) {
                slopes[i] = before ? -1 : 0;
                slopes[row + i] = before ? 1 : -1;
                slopes[2 * row + i] = before ? 0 : 1;
            }
        }
        return whole == whole ? int64_t(whole) - 1 : -c.width - 4;
    }

    // Rows [from, to] of the table blended along x by three weights, into ``into`` (rows outside the table are zero).
    void blend(const T* by, int64_t x, int64_t from, int64_t to, T* into) const {
        for (int64_t y = from; y <= to; ++y, into += row) {
            if (y < 0 || y >= c.table_height) {
                for (int64_t i = 0; i < row; i += L) store(into + i, V<T>{});
                continue;
            }
            const T* t = padded.data() + y * pitch + margin + x;
            for (int64_t i = 0; i < c.width; i += L)
                store(into + i, load(by + i) * load(t + i) + load(by + row + i) * load(t + i + 1) + load(by + 2 * row + i) * load(t + i + 2));
        }
    }
    // First and last table row that the block's queries read for this key; an empty range where all is outside.
    bool rows_of(T start, int64_t rows, int64_t& from, int64_t& to) const {
        const T last = start + (rows - 1) * c.step_y;
        if (!(start < T(c.table_height)) || !(last >= -1)) return false;
        from = std::max<int64_t>(int64_t(std::floor(start)), -2);
        to = std::min<int64_t>(int64_t(std::floor(last)) + 1, c.table_height);
        from = std::max<int64_t>(from, -1);
        return true;
    }

    void bias(int64_t image, int64_t head, int64_t first_row, int64_t rows) {
        for (int64_t key = 0; key < c.keys; ++key) {
            const T* p = position(image, head, key);
            T* into = scores.data() + key * block;
            const T start = c.origin_y + c.slope_y * p[0] + first_row * c.step_y;
            if (start != start || p[1] != p[1]) {
                std::fill(into, into + rows * c.width, start + p[1]);
                continue;
            }
            int64_t from, to;
            if (!rows_of(start, rows, from, to)) {
                std::fill(into, into + rows * c.width, T(0));
                continue;
            }
            const int64_t x = columns_of(p[1], false);
            blend(weights.data(), x, from, to, mixed.data());
            for (int64_t y = 0; y < rows; ++y) {
                const T at = start + y * c.step_y, floor = std::floor(at), f = at - floor;
                T* target = into + y * c.width;
                const T* a = row_at(mixed, int64_t(floor), from, to);
                const T* b = row_at(mixed, int64_t(floor) + 1, from, to);
                for (int64_t i = 0; i < c.width; i += L) {
                    const V<T> upper = a ? load(a + i) : V<T>{}, lower = b ? load(b + i) : V<T>{};
                    store(target + i, upper + f * (lower - upper));
                }
            }
        }
    }
    T* row_at(Memory<T>& rows, int64_t y, int64_t from, int64_t to) const {
        return y < from || y > to ? nullptr : rows.data() + (y - from) * row;
    }

    // Scores of the block's queries, bias included; q scaled.
    void block_scores(int64_t image, int64_t head, int64_t first_row, int64_t rows) {
        const int64_t count = rows * c.width, columns = round_up(count, L);
        pack_transposed(c.at(c.q, 0, image, head) + first_row * c.width * c.strides[2], c.strides[2], count, c.scale, qt.data());
        if (c.table) {
            bias(image, head, first_row, rows);
            for (int64_t key = 0; key < c.keys; ++key)
                std::fill(scores.data() + key * block + count, scores.data() + key * block + columns, T(0));
            product<T, true>(c.keys, columns, c.dim, kk.data(), dim, 1, qt.data(), block, scores.data(), block);
        } else {
            product<T, false>(c.keys, columns, c.dim, kk.data(), dim, 1, qt.data(), block, scores.data(), block);
        }
    }

    void forward(int64_t image, int64_t head) {
        pack(c.at(c.k, 1, image, head), c.strides[5], c.keys, kk.data());
        pack(c.at(c.v, 2, image, head), c.strides[8], c.keys, vv.data());
        if (c.table) load_table(head);
        for (int64_t first = 0; first < c.height; first += block_rows) {
            const int64_t rows = std::min(block_rows, c.height - first), count = rows * c.width, columns = round_up(count, L);
            block_scores(image, head, first, rows);
            for (int64_t n = 0; n < columns; n += L) {
                V<T> highest = load(scores.data() + n);
                for (int64_t key = 1; key < c.keys; ++key) {
                    const V<T> s = load(scores.data() + key * block + n);
                    highest = s > highest ? s : highest;
                }
                V<T> sum{};
                for (int64_t key = 0; key < c.keys; ++key) {
                    T* s = scores.data() + key * block + n;
                    const V<T> e = exponential(load(s) - highest);
                    store(s, e);
                    sum += e;
                }
                store(line.data() + n, highest);
                store(column_sum.data() + n, sum);
            }
            product<T, false>(count, dim, c.keys, scores.data(), 1, block, vv.data(), dim, acc_q.data(), dim);
            T* out = c.at(c.out, 3, image, head) + first * c.width * c.strides[11];
            T* lse = c.lse + (image * c.heads + head) * queries + first * c.width;
            for (int64_t i = 0; i < count; ++i) {
                const T inverse = 1 / column_sum[i];
                for (int64_t d = 0; d < c.dim; ++d) out[i * c.strides[11] + d] = acc_q[i * dim + d] * inverse;
                lse[i] = line[i] + std::log(column_sum[i]);
            }
        }
    }

    void backward(int64_t image, int64_t head) {
        pack(c.at(c.k, 1, image, head), c.strides[5], c.keys, kk.data());
        pack(c.at(c.v, 2, image, head), c.strides[8], c.keys, vv.data());
        if (c.table) load_table(head);
        std::fill(acc_k.begin(), acc_k.end(), T(0));
        std::fill(acc_v.begin(), acc_v.end(), T(0));
        for (int64_t first = 0; first < c.height; first += block_rows) {
            const int64_t rows = std::min(block_rows, c.height - first), count = rows * c.width, columns = round_up(count, L);
            block_scores(image, head, first, rows);
            const T* grad = c.at(c.grad_out, 4, image, head) + first * c.width * c.strides[14];
            const T* out = c.at(c.out_in, 3, image, head) + first * c.width * c.strides[11];
            pack(grad, c.strides[14], count, gg.data());
            pack_transposed(grad, c.strides[14], count, 1, gt.data());
            const T* q = c.at(c.q, 0, image, head) + first * c.width * c.strides[2];
            pack(q, c.strides[2], count, qs.data());
            const T* lse = c.lse_in + (image * c.heads + head) * queries + first * c.width;
            for (int64_t i = 0; i < columns; ++i) {
                line[i] = i < count ? lse[i] : T(0);
                delta[i] = 0;
                for (int64_t d = 0; i < count && d < c.dim; ++d) delta[i] += grad[i * c.strides[14] + d] * out[i * c.strides[11] + d];
            }
            product<T, false>(c.keys, columns, c.dim, vv.data(), dim, 1, gt.data(), block, grads.data(), block);
            for (int64_t key = 0; key < c.keys; ++key)
                for (int64_t n = 0; n < columns; n += L) {
                    const V<T> weight = exponential(load(scores.data() + key * block + n) - load(line.data() + n));
                    store(scores.data() + key * block + n, weight);
                    T* g = grads.data() + key * block + n;
                    store(g, weight * (load(g) - load(delta.data() + n)));
                }
            product<T, true>(c.keys, dim, count, scores.data(), block, 1, gg.data(), dim, acc_v.data(), dim);
            product<T, true>(c.keys, dim, count, grads.data(), block, 1, qs.data(), dim, acc_k.data(), dim);
            product<T, false>(count, dim, c.keys, grads.data(), 1, block, kk.data(), dim, acc_q.data(), dim);
            T* grad_q = c.at(c.grad_q, 5, image, head) + first * c.width * c.strides[17];
            for (int64_t i = 0; i < count; ++i)
                for (int64_t d = 0; d < c.dim; ++d) grad_q[i * c.strides[17] + d] = acc_q[i * dim + d] * c.scale;
            if (c.table) bias_gradient(image, head, first, rows);
        }
        T* grad_k = c.at(c.grad_k, 6, image, head);
        T* grad_v = c.at(c.grad_v, 7, image, head);
        for (int64_t i = 0; i < c.keys; ++i)
            for (int64_t d = 0; d < c.dim; ++d) {
                grad_k[i * c.strides[20] + d] = acc_k[i * dim + d] * c.scale;
                grad_v[i * c.strides[23] + d] = acc_v[i * dim + d];
            }
    }

    // The gradient of the block's bias (grads) to the table's and the positions': bias() turned round.
    void bias_gradient(int64_t image, int64_t head, int64_t first_row, int64_t rows) {
        T* into = c.grad_positions + (image * c.heads + head) * c.keys * 2;
        for (int64_t key = 0; key < c.keys; ++key) {
            const T* p = position(image, head, key);
            T* source = grads.data() + key * block;
            const T start = c.origin_y + c.slope_y * p[0] + first_row * c.step_y;
            int64_t from, to;
            if (start != start || p[1] != p[1]) {
                into[2 * key] = into[2 * key + 1] = start + p[1];
                continue;
            }
            if (!rows_of(start, rows, from, to)) continue;
            const int64_t x = columns_of(p[1], true);
            blend(weights.data(), x, from, to, mixed.data());
            std::fill(grad_mixed.begin(), grad_mixed.begin() + (to - from + 1) * row, T(0));
            V<T> sum_y{};
            for (int64_t y = 0; y < rows; ++y) {
                const T at = start + y * c.step_y, floor = std::floor(at), f = at - floor;
                const T* a = row_at(mixed, int64_t(floor), from, to);
                const T* b = row_at(mixed, int64_t(floor) + 1, from, to);
                T* ga = row_at(grad_mixed, int64_t(floor), from, to);
                T* gb = row_at(grad_mixed, int64_t(floor) + 1, from, to);
                for (int64_t i = 0; i < c.width; i += L) {
                    const V<T> g = within(load(source + y * c.width + i), i);
                    const V<T> upper = a ? load(a + i) : V<T>{}, lower = b ? load(b + i) : V<T>{};
                    sum_y += g * (lower - upper);
                    if (ga) store(ga + i, load(ga + i) + (1 - f) * g);
                    if (gb) store(gb + i, load(gb + i) + f * g);
                }
            }
            blend(slopes.data(), x, from, to, mixed.data());
            V<T> sum_x{};
            const int64_t wide = row + 2 * L;
            for (int64_t y = std::max<int64_t>(from, 0); y <= std::min(to, c.table_height - 1); ++y) {
                const T* g = grad_mixed.data() + (y - from) * row;
                const T* m = mixed.data() + (y - from) * row;
                T* t = grad_padded.data() + (head * c.table_height + y) * pitch + margin + x;
                for (int64_t i = 0; i < c.width; i += L) {
                    const V<T> value = load(g + i);
                    sum_x += value * load(m + i);
                    for (int tap = 0; tap < 3; ++tap) store(spread.data() + tap * wide + L + i, value * load(weights.data() + tap * row + i));
                }
                for (int64_t i = 0; i < c.width + 2; i += L)
                    store(t + i, load(t + i) + load(spread.data() + L + i) + load(spread.data() + wide + L + i - 1) + load(spread.data() + 2 * wide + L + i - 2));
            }
            T along_y = 0, along_x = 0;
            for (int i = 0; i < L; ++i) { along_y += sum_y[i]; along_x += sum_x[i]; }
            into[2 * key] += along_y * c.slope_y;
            into[2 * key + 1] += along_x * c.slope_x;
        }
    }
    // Lanes past the last query column belong to another row: zero them.
    V<T> within(V<T> g, int64_t i) const { return i + L <= c.width ? g : (load(inside.data() + i) > 0 ? g : V<T>{}); }
};

template <class T> void run(const Call<T>& call, bool backward, int64_t threads, T* grad_tables) {
    const int64_t items = call.batch * call.heads;
    threads = std::max<int64_t>(1, std::min(threads, items));
    auto work = [&](int64_t thread) {
        Worker<T> worker(call, backward);
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
    };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}

template <class T>
int call(void** p, const int64_t* strides, const int64_t* sizes, const double* numbers, int64_t backward, int64_t threads) try {
    Call<T> c{};
    c.q = (const T*)p[0]; c.k = (const T*)p[1]; c.v = (const T*)p[2]; c.positions = (const T*)p[3]; c.table = (const T*)p[4];
    c.out = (T*)p[5]; c.out_in = (const T*)p[5]; c.lse = (T*)p[6]; c.lse_in = (const T*)p[6]; c.grad_out = (const T*)p[7];
    c.grad_q = (T*)p[8]; c.grad_k = (T*)p[9]; c.grad_v = (T*)p[10]; c.grad_positions = (T*)p[11];
    c.strides = strides;
    c.batch = sizes[0]; c.heads = sizes[1]; c.groups = sizes[2]; c.height = sizes[3]; c.width = sizes[4]; c.keys = sizes[5];
    c.dim = sizes[6]; c.table_height = sizes[7]; c.table_width = sizes[8];
    c.origin_y = numbers[0]; c.slope_y = numbers[1]; c.step_y = numbers[2];
    c.origin_x = numbers[3]; c.slope_x = numbers[4]; c.step_x = numbers[5]; c.scale = numbers[6];
    run<T>(c, backward != 0, threads, (T*)p[12]);
    return 0;
} catch (...) {
    return 1;
}

}  // namespace

extern "C" {
int dattrain_core_f32(void** p, const int64_t* s, const int64_t* n, const double* x, int64_t b, int64_t t) { return call<float>(p, s, n, x, b, t); }
int dattrain_core_f64(void** p, const int64_t* s, const int64_t* n, const double* x, int64_t b, int64_t t) { return call<double>(p, s, n, x, b, t); }
}
