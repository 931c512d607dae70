// What the native kernels share: vectors of 64 bytes, bfloat16 in memory, small matrix products, and threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifndef _OPENMP
#include <thread>
#endif
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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

// bfloat16 as it lies in memory; computed with as float, rounded to nearest even as torch does.
struct bf16 { uint16_t bits; };

inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
template <class S, class T> inline S narrow(T x) {
    if constexpr (std::is_same_v<S, bf16>) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
    } else {
        return x;
    }
}
// The loops are plain so that the compiler vectorises them with whatever this CPU has.
template <class T, class S> inline void widen_all(const S* from, int64_t count, T* into) {
    for (int64_t i = 0; i < count; ++i) into[i] = widen(from[i]);
}
template <class T, class S> inline void narrow_all(const T* from, int64_t count, T factor, S* into) {
    for (int64_t i = 0; i < count; ++i) into[i] = narrow<S>(from[i] * factor);
}

// How a product multiplies: numbers as they are, or pairs of bf16 (two steps of depth in 32 bits) where the CPU has that.
template <class T> struct Plain {
    typedef T Element;
    typedef V<T> Right;
    typedef V<T> Sum;
    static Right right(const T* p) { return ::load(p); }
    static Sum load(const T* p) { return ::load(p); }
    static void store(T* p, Sum sum) { ::store(p, sum); }
    static Sum add(Sum sum, T left, Right right) { return sum + left * right; }
};
#ifdef __AVX512BF16__
constexpr bool has_pairs = true;
struct Pairs {
    typedef uint32_t Element;
    typedef __m512i Right;
    static Right right(const uint32_t* p) { return _mm512_loadu_si512(p); }
    // Sums are of the intrinsics' own type: cast at every step, GCC (12) keeps a copy of each on the stack, at half the speed.
    typedef __m512 Sum;
    static Sum load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
    static Sum add(Sum sum, uint32_t left, Right right) { return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right); }
};
#else
constexpr bool has_pairs = false;
typedef Plain<float> Pairs;
#endif

// c[m][n] (+)= sum over p of a[m * am + p * ap] * b[p * ldb + n], for ROWS rows and COLS vectors of columns.
template <class How, class T, class E, int ROWS, int COLS, bool ADD>
inline void tile(int64_t depth, const E* a, int64_t am, int64_t ap, const E* b, int64_t ldb, T* c, int64_t ldc) {
    typename How::Sum sum[ROWS][COLS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) sum[r][j] = ADD ? How::load(c + r * ldc + j * lanes<T>) : typename How::Sum{};
    for (int64_t p = 0; p < depth; ++p) {
        typename How::Right right[COLS];
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) right[j] = How::right(b + p * ldb + j * lanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const E left = a[r * am + p * ap];
#pragma GCC unroll 4
            for (int j = 0; j < COLS; ++j) sum[r][j] = How::add(sum[r][j], left, right[j]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; ++j) How::store(c + r * ldc + j * lanes<T>, sum[r][j]);
}

// columns is a multiple of the vector length; all matrices are padded to it.
template <class How, class T, bool ADD, class E = typename How::Element>
void product_of(int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t am, int64_t ap, const E* b, int64_t ldb, T* c, int64_t ldc) {
    constexpr int L = lanes<T>;
    for (int64_t n = 0; n < columns;) {
        const int64_t left = (columns - n) / L;
        const int width = left >= 4 || left == 2 ? (left >= 4 ? 4 : 2) : (left == 3 ? 2 : 1);
        int64_t m = 0;
        if (width == 4) {
            for (; m + 6 <= rows; m += 6) tile<How, T, E, 6, 4, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<How, T, E, 1, 4, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        } else if (width == 2) {
            for (; m + 12 <= rows; m += 12) tile<How, T, E, 12, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m + 4 <= rows; m += 4) tile<How, T, E, 4, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<How, T, E, 1, 2, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        } else {
            for (; m + 12 <= rows; m += 12) tile<How, T, E, 12, 1, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
            for (; m < rows; ++m) tile<How, T, E, 1, 1, ADD>(depth, a + m * am, am, ap, b + n, ldb, c + m * ldc + n, ldc);
        }
        n += width * L;
    }
}
template <class T, bool ADD>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t am, int64_t ap, const T* b, int64_t ldb, T* c, int64_t ldc) {
    product_of<Plain<T>, T, ADD>(rows, columns, depth, a, am, ap, b, ldb, c, ldc);
}

// rows x depth and columns x depth vectors of S in memory, multiplied: c[m][n] (+)= a[m] . b[n]. Both are packed here.
template <class T, class S> struct Dot {
    std::vector<T> a, b;
    std::vector<uint32_t> pa, pb;

    template <bool ADD>
    void operator()(int64_t rows, const S* from_a, int64_t stride_a, int64_t columns, const S* from_b, int64_t stride_b, int64_t depth, T* c, int64_t ldc) {
        const int64_t padded = round_up(columns, lanes<T>);
        if constexpr (has_pairs && std::is_same_v<S, bf16>) {
            if (depth % 2 == 0) {
                const int64_t half = depth / 2;
                pa.resize(rows * half);
                pb.resize(half * padded);
                for (int64_t m = 0; m < rows; ++m) std::memcpy(pa.data() + m * half, from_a + m * stride_a, depth * sizeof(S));
                spread(reinterpret_cast<const char*>(from_b), stride_b * int64_t(sizeof(S)), columns, half, pb.data(), padded);
                product_of<Pairs, T, ADD>(rows, padded, half, pa.data(), half, 1, pb.data(), padded, c, ldc);
                return;
            }
        }
        a.resize(rows * depth);
        b.resize(depth * padded);
        for (int64_t m = 0; m < rows; ++m) widen_all(from_a + m * stride_a, depth, a.data() + m * depth);
        for (int64_t p = 0; p < depth; ++p) {
            for (int64_t n = 0; n < columns; ++n) b[p * padded + n] = widen(from_b[n * stride_b + p]);
            std::fill(b.begin() + p * padded + columns, b.begin() + (p + 1) * padded, T(0));
        }
        product<T, ADD>(rows, padded, depth, a.data(), depth, 1, b.data(), padded, c, ldc);
    }

    // Rows of 32-bit numbers to columns.
    static void spread(const char* from, int64_t stride, int64_t rows, int64_t count, uint32_t* into, int64_t padded) {
        for (int64_t p = 0; p < count; ++p) {
            for (int64_t n = 0; n < rows; ++n) std::memcpy(into + p * padded + n, from + n * stride + p * 4, 4);
            std::fill(into + p * padded + rows, into + (p + 1) * padded, 0u);
        }
    }
};

// Scores' weights or gradients times rows of S in memory: c[m][n] (+)= sum over p of a[m * am + p * ap] * b[p * stride + n]; am or ap
// is 1, and c has ``columns`` rounded up to whole vectors. Where the CPU multiplies pairs of bf16, a is rounded to it, as torch's products in
// bf16 take theirs.
template <class T, class S> struct Weighted {
    std::vector<T> wide;
    std::vector<uint32_t> pa, pb;

    template <bool ADD>
    void operator()(int64_t rows, const T* a, int64_t am, int64_t ap, int64_t depth, const S* b, int64_t stride, int64_t columns, T* c) {
        const int64_t padded = round_up(columns, lanes<T>);
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<S, bf16>) {
            const int64_t half = (depth + 1) / 2, pitch = round_up(ap == 1 ? half : rows, 16);
            pa.resize(ap == 1 ? rows * pitch : half * pitch);
            pb.resize(half * padded);
            for (int64_t n = 0; n < columns; n += 16) {
                const auto mask = first(columns - n);
                down([&](int64_t p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + p * stride + n)); }, depth, pb.data() + n, padded);
            }
            if (ap == 1) {
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t p = 0; p < depth; p += 16)
                        _mm256_storeu_si256((__m256i*)(pa.data() + m * pitch + p / 2), narrowed(_mm512_maskz_loadu_ps(first(depth - p), a + m * am + p)));
                product_of<Pairs, T, ADD>(rows, padded, half, pa.data(), pitch, 1, pb.data(), padded, c, padded);
            } else {
                for (int64_t m = 0; m < rows; m += 16)
                    down([&](int64_t p) { return _mm512_cvtepu16_epi32(narrowed(_mm512_loadu_ps(a + p * ap + m))); }, depth, pa.data() + m, pitch);
                product_of<Pairs, T, ADD>(rows, padded, half, pa.data(), 1, pitch, pb.data(), padded, c, padded);
            }
            return;
        }
#endif
        wide.resize(depth * padded);
        for (int64_t p = 0; p < depth; ++p) {
            widen_all(b + p * stride, columns, wide.data() + p * padded);
            std::fill(wide.begin() + p * padded + columns, wide.begin() + (p + 1) * padded, T(0));
        }
        product<T, ADD>(rows, padded, depth, a, am, ap, wide.data(), padded, c, padded);
    }

#ifdef __AVX512BF16__
    static __mmask16 first(int64_t count) { return count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xffff); }
    static __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
    // Numbers of a row and of the next, in pairs; the last of an odd number of rows has zeros for its next.
    template <class Row> static void down(const Row& row, int64_t rows, uint32_t* into, int64_t pitch) {
        for (int64_t p = 0; p < rows; p += 2) {
            __m512i pair = row(p);
            if (p + 1 < rows) pair = _mm512_or_si512(pair, _mm512_slli_epi32(row(p + 1), 16));
            _mm512_storeu_si512(into + p / 2 * pitch, pair);
        }
    }
#endif
};

// The sum of x * y, for rows of both: what a query's gradient of scores is less by.
template <class T, class S>
inline void row_products(const S* x, int64_t stride_x, const S* y, int64_t stride_y, int64_t rows, int64_t count, T* into) {
    constexpr int L = lanes<T>;
    for (int64_t i = 0; i < rows; ++i) {
        const S *left = x + i * stride_x, *right = y + i * stride_y;
        T partial[L] = {};
        int64_t n = 0;
        for (; n + L <= count; n += L)
            for (int j = 0; j < L; ++j) partial[j] += widen(left[n + j]) * widen(right[n + j]);
        for (int j = 0; n + j < count; ++j) partial[j] += widen(left[n + j]) * widen(right[n + j]);
        into[i] = 0;
        for (int j = 0; j < L; ++j) into[i] += partial[j];
    }
}

// exp(scale * (s - highest)) of every column of keys x columns scores, in place; the highest scores, and the sums. columns is a
// multiple of the vector length.
template <class T>
inline void exponentials(T* scores, int64_t keys, int64_t columns, int64_t ld, T scale, T* highest_of, T* sum_of) {
    for (int64_t n = 0; n < columns; n += lanes<T>) {
        V<T> highest = load(scores + n), sum{};
        for (int64_t key = 1; key < keys; ++key) {
            const V<T> s = load(scores + key * ld + n);
            highest = s > highest ? s : highest;
        }
        for (int64_t key = 0; key < keys; ++key) {
            T* s = scores + key * ld + n;
            const V<T> e = exponential((load(s) - highest) * scale);
            store(s, e);
            sum += e;
        }
        store(highest_of + n, highest);
        store(sum_of + n, sum);
    }
}

// The same of more keys: ``highest_of`` and ``sum_of`` go on, and what was summed so far is to be multiplied by ``shrink_of``.
template <class T>
inline void more_exponentials(T* scores, int64_t keys, int64_t columns, int64_t ld, T scale, T* highest_of, T* sum_of, T* shrink_of) {
    for (int64_t n = 0; n < columns; n += lanes<T>) {
        const V<T> before = load(highest_of + n);
        V<T> highest = before, sum{};
        for (int64_t key = 0; key < keys; ++key) {
            const V<T> s = load(scores + key * ld + n);
            highest = s > highest ? s : highest;
        }
        for (int64_t key = 0; key < keys; ++key) {
            T* s = scores + key * ld + n;
            const V<T> e = exponential((load(s) - highest) * scale);
            store(s, e);
            sum += e;
        }
        const V<T> shrink = exponential((before - highest) * scale);
        store(highest_of + n, highest);
        store(sum_of + n, load(sum_of + n) * shrink + sum);
        store(shrink_of + n, shrink);
    }
}

// work(thread) for each of so many threads. OpenMP's where there is OpenMP: torch's own threads go on spinning for a while
// after torch has used them, and others would have to share the cores with them.
template <class F> void on_threads(int64_t threads, F work) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(int(threads))
    for (int64_t thread = 0; thread < threads; ++thread) work(thread);
#else
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
#endif
}

}  // namespace
