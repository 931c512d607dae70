// What the native kernels share: vectors of 64 bytes, bfloat16 in memory, exponentials, and threads.

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
