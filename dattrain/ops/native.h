// What the native kernels share: vectors of 64 bytes, bfloat16 in memory, and threads.

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
