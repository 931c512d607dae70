// Small matrix products for attention: by vectors, by pairs of bf16, or by the tile unit where the CPU has one.

#pragma once

#include "native.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define DATTRAIN_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

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

inline __mmask16 first(int64_t count) { return count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xffff); }

// into[p][m] = from[m][p] of rows x count numbers, 16 x 16 at a time; rows of ``into`` are filled up to whole vectors, with zeros.
inline void transpose(const char* from, int64_t stride, int64_t rows, int64_t count, uint32_t* into, int64_t pitch) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t m = 0; m < rows; m += 16)
        for (int64_t p = 0; p < count; p += 16) {
            __m512i x[16], y[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i)
                x[i] = m + i < rows ? _mm512_maskz_loadu_epi32(first(count - p), from + (m + i) * stride + p * 4) : _mm512_setzero_si512();
            // Rows i and i + 8 dealt out in turns, four times.
#pragma GCC unroll 4
            for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    y[2 * i] = _mm512_permutex2var_epi32(x[i], low, x[i + 8]);
                    y[2 * i + 1] = _mm512_permutex2var_epi32(x[i], high, x[i + 8]);
                }
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) x[i] = y[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16 && p + i < count; ++i) _mm512_storeu_si512(into + (p + i) * pitch + m, x[i]);
        }
}
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

#ifdef DATTRAIN_TILES
// Products of pairs by the tile unit: 16 x 16 sums, plus 16 rows of 16 pairs times 16 pairs of 16 columns, is one instruction
// (Intel's Architecture Instruction Set Extensions Programming Reference, "Intel AMX").
struct TileUnit {
    // The kernel gives a process the tiles' registers when it is asked. What the tiles multiply is compared once with what vectors do.
    static bool usable() {
        static const bool yes = [] {
            constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA (linux/Documentation/arch/x86/xstate.rst)
            return syscall(SYS_arch_prctl, request, tile_data) == 0 && agrees();
        }();
        return yes;
    }

    template <bool ADD>
    static void product(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t am, int64_t ap, const uint32_t* b, int64_t ldb, float* c, int64_t ldc) {
        alignas(64) uint32_t turned[16 * 16];
        Shape shape{};
        for (int64_t begin = 0; begin < depth;) {
            // Whole tiles first, in one go; then what is left of the depth.
            const int64_t pairs = std::min<int64_t>(16, depth - begin), end = begin + (depth - begin) / pairs * pairs;
            for (int64_t m = 0; m < rows; m += 16) {
                const int64_t some = std::min<int64_t>(16, rows - m);
                if (shape.set(some, pairs)) {
                    seen(&shape);
                    _tile_loadconfig(&shape);
                }
                for (int64_t n = 0; n < columns; n += 64) {
                    const int64_t width = columns - n;
                    float* into = c + m * ldc + n;
                    if (ADD || begin > 0) {
                        seen(into);
                        _tile_loadd(0, into, ldc * 4);
                        if (width > 16) _tile_loadd(1, into + 16, ldc * 4);
                        if (width > 32) _tile_loadd(2, into + 32, ldc * 4);
                        if (width > 48) _tile_loadd(3, into + 48, ldc * 4);
                    } else {
                        _tile_zero(0);
                        _tile_zero(1);
                        _tile_zero(2);
                        _tile_zero(3);
                    }
                    for (int64_t p = begin; p < end; p += pairs) {
                        const uint32_t *left = a + m * am + p * ap, *right = b + p * ldb + n;
                        int64_t stride = am;
                        if (ap != 1) {
                            transpose(reinterpret_cast<const char*>(left), ap * 4, pairs, some, turned, 16);
                            left = turned;
                            stride = 16;
                        }
                        seen(left);
                        seen(right);
                        _tile_loadd(4, left, stride * 4);
                        _tile_loadd(5, right, ldb * 4);
                        _tile_dpbf16ps(0, 4, 5);
                        if (width > 16) {
                            _tile_loadd(6, right + 16, ldb * 4);
                            _tile_dpbf16ps(1, 4, 6);
                        }
                        if (width > 32) {
                            _tile_loadd(7, right + 32, ldb * 4);
                            _tile_dpbf16ps(2, 4, 7);
                        }
                        if (width > 48) {
                            _tile_loadd(5, right + 48, ldb * 4);
                            _tile_dpbf16ps(3, 4, 5);
                        }
                    }
                    _tile_stored(0, into, ldc * 4);
                    if (width > 16) _tile_stored(1, into + 16, ldc * 4);
                    if (width > 32) _tile_stored(2, into + 32, ldc * 4);
                    if (width > 48) _tile_stored(3, into + 48, ldc * 4);
                }
            }
            begin = end;
        }
        _tile_release();
    }

  private:
    // As LDTILECFG reads it: tiles 0 to 3 are sums, 4 the left, 5 to 7 the right.
    struct alignas(64) Shape {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
        bool set(int64_t some, int64_t pairs) {
            if (palette && rows[4] == some && rows[5] == pairs) return false;
            palette = 1;
            for (int i = 0; i < 8; ++i) {
                rows[i] = uint8_t(i < 5 ? some : pairs);
                row_bytes[i] = uint16_t(i == 4 ? 4 * pairs : 64);
            }
            return true;
        }
    };
    // The intrinsics do not tell every compiler that they read memory (GCC 12: those that load).
    static void seen(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

    static bool agrees() {
        constexpr int64_t rows = 19, columns = 80, depth = 21;
        std::vector<uint32_t> a(rows * depth), b(depth * columns);
        // Pairs of 1 to 1.99, some of them negative.
        const auto fill = [](std::vector<uint32_t>& x, uint32_t step) {
            for (uint32_t i = 0; i < x.size(); ++i) x[i] = 0x3f803f80u | i * step % 128 | (i * 31 % 128) << 16 | (i % 3 ? 0u : 0x8000u);
        };
        fill(a, 37);
        fill(b, 53);
        std::vector<float> expected(rows * columns, 0.5f), found = expected;
        product_of<Pairs, float, true>(rows, columns, depth, a.data(), depth, 1, b.data(), columns, expected.data(), columns);
        product<true>(rows, columns, depth, a.data(), depth, 1, b.data(), columns, found.data(), columns);
        return std::equal(found.begin(), found.end(), expected.begin(), [](float x, float y) { return std::abs(x - y) < 1e-3f; });
    }
};
#endif

#ifdef __AVX512BF16__
template <class T, bool ADD>
void product_of_pairs(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t am, int64_t ap, const uint32_t* b, int64_t ldb, T* c, int64_t ldc) {
#ifdef DATTRAIN_TILES
    if (TileUnit::usable()) return TileUnit::product<ADD>(rows, columns, depth, a, am, ap, b, ldb, c, ldc);
#endif
    product_of<Pairs, T, ADD>(rows, columns, depth, a, am, ap, b, ldb, c, ldc);
}
#endif
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
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<S, bf16>) {
            if (depth % 2 == 0) {
                const int64_t half = depth / 2;
                pa.resize(rows * half);
                pb.resize(half * padded);
                for (int64_t m = 0; m < rows; ++m) std::memcpy(pa.data() + m * half, from_a + m * stride_a, depth * sizeof(S));
                transpose(reinterpret_cast<const char*>(from_b), stride_b * int64_t(sizeof(S)), columns, half, pb.data(), padded);
                product_of_pairs<T, ADD>(rows, padded, half, pa.data(), half, 1, pb.data(), padded, c, ldc);
                return;
            }
        }
#endif
        a.resize(rows * depth);
        b.resize(depth * padded);
        for (int64_t m = 0; m < rows; ++m) widen_all(from_a + m * stride_a, depth, a.data() + m * depth);
        for (int64_t p = 0; p < depth; ++p) {
            for (int64_t n = 0; n < columns; ++n) b[p * padded + n] = widen(from_b[n * stride_b + p]);
            std::fill(b.begin() + p * padded + columns, b.begin() + (p + 1) * padded, T(0));
        }
        product<T, ADD>(rows, padded, depth, a.data(), depth, 1, b.data(), padded, c, ldc);
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
                product_of_pairs<T, ADD>(rows, padded, half, pa.data(), pitch, 1, pb.data(), padded, c, padded);
            } else {
                for (int64_t m = 0; m < rows; m += 16)
                    down([&](int64_t p) { return _mm512_cvtepu16_epi32(narrowed(_mm512_loadu_ps(a + p * ap + m))); }, depth, pa.data() + m, pitch);
                product_of_pairs<T, ADD>(rows, padded, half, pa.data(), 1, pitch, pb.data(), padded, c, padded);
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

}  // namespace
