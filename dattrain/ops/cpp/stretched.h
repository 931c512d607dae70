// A table that is stretched over a map of another size: a vector of query columns, each between two entries of a table row.

#pragma once

#include "native.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

template <class T> struct AnyColumns {
    int32_t left[lanes<T>];  // entry; the other is the next
    V<T> beyond;             // how far from it

    void set(V<T> at, V<T> floor) {
        beyond = at - floor;
        for (int j = 0; j < lanes<T>; ++j) left[j] = int32_t(floor[j]);
    }
    V<T> blend(const T* row) const {
        V<T> low, high;
        ends(row, low, high);
        return low + beyond * (high - low);
    }
    V<T> slope(const T* row) const {
        V<T> low, high;
        ends(row, low, high);
        return high - low;
    }
    // The gradient of what ``blend`` gave, to that of the row.
    void add(T* row, V<T> g) const {
        const V<T> high = beyond * g, low = g - high;
        for (int j = 0; j < lanes<T>; ++j) {
            row[left[j]] += low[j];
            row[left[j] + 1] += high[j];
        }
    }

  private:
    void ends(const T* row, V<T>& low, V<T>& high) const {
        for (int j = 0; j < lanes<T>; ++j) {
            low[j] = row[left[j]];
            high[j] = row[left[j] + 1];
        }
    }
};

template <class T> struct Columns : AnyColumns<T> {};

#ifdef __AVX512F__
// Columns are in order, and where the table's are wider all entries of a vector lie in sixteen neighbours: one load, from which columns
// pick theirs. Of a gradient, runs of columns with the same entry are summed first, by halves, instead of one after the other in memory.
template <> struct Columns<float> {
    void set(V<float> at, V<float> floor) {
        far.set(at, floor);
        first = far.left[0];
        near = far.left[15] - first < 15;
        if (!near) return;
        index = _mm512_sub_epi32(_mm512_loadu_si512(far.left), _mm512_set1_epi32(first));
        same[0] = __mmask16(_mm512_cmpeq_epi32_mask(index, _mm512_alignr_epi32(index, index, 1)) & 0x7fff);
        same[1] = __mmask16(_mm512_cmpeq_epi32_mask(index, _mm512_alignr_epi32(index, index, 2)) & 0x3fff);
        same[2] = __mmask16(_mm512_cmpeq_epi32_mask(index, _mm512_alignr_epi32(index, index, 4)) & 0x0fff);
        same[3] = __mmask16(_mm512_cmpeq_epi32_mask(index, _mm512_alignr_epi32(index, index, 8)) & 0x00ff);
        heads = __mmask16(~(unsigned(same[0]) << 1));
        entries = __mmask16(_mm512_mask_reduce_or_epi32(heads, _mm512_sllv_epi32(_mm512_set1_epi32(1), index)));
    }
    V<float> blend(const float* row) const {
        if (!near) return far.blend(row);
        const __m512 window = _mm512_loadu_ps(row + first), low = pick(window, 0), high = pick(window, 1);
        return (V<float>)_mm512_fmadd_ps((__m512)far.beyond, _mm512_sub_ps(high, low), low);
    }
    V<float> slope(const float* row) const {
        if (!near) return far.slope(row);
        const __m512 window = _mm512_loadu_ps(row + first);
        return (V<float>)_mm512_sub_ps(pick(window, 1), pick(window, 0));
    }
    void add(float* row, V<float> g) const {
        if (!near) return far.add(row, g);
        const __m512 high = _mm512_mul_ps((__m512)far.beyond, (__m512)g), low = _mm512_sub_ps((__m512)g, high);
        const __m512i next = _mm512_castps_si512(by_entry(high));
        const __m512 moved = _mm512_castsi512_ps(_mm512_alignr_epi32(next, _mm512_setzero_si512(), 15));
        _mm512_storeu_ps(row + first, _mm512_add_ps(_mm512_loadu_ps(row + first), _mm512_add_ps(by_entry(low), moved)));
    }

  private:
    AnyColumns<float> far;
    bool near;
    int32_t first;
    __m512i index;               // of the left entry, from the first
    __mmask16 same[4];           // columns that have the same one as the column 1, 2, 4, 8 further
    __mmask16 heads, entries;    // the first column of each run; the runs' entries

    __m512 pick(__m512 window, int next) const { return _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(next)), window); }
    // Sums of runs, where their entries are.
    __m512 by_entry(__m512 x) const {
        x = _mm512_add_ps(x, further<1>(same[0], x));
        x = _mm512_add_ps(x, further<2>(same[1], x));
        x = _mm512_add_ps(x, further<4>(same[2], x));
        x = _mm512_add_ps(x, further<8>(same[3], x));
        return _mm512_maskz_expand_ps(entries, _mm512_maskz_compress_ps(heads, x));
    }
    template <int BY> static __m512 further(__mmask16 where, __m512 x) {
        const __m512i bits = _mm512_castps_si512(x);
        return _mm512_castsi512_ps(_mm512_maskz_alignr_epi32(where, bits, bits, BY));
    }
};
#endif

}  // namespace
