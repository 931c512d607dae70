// The tile unit's instructions (Intel AMX), carried out in plain C++, for a CPU without one: before anything else is included. What is an
// exception on the unit ends the process here. EMULATED_TILES=refused: the kernel gives no registers; wrong: products are off by one.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

extern "C" {
inline long emulated_products = 0;
}

namespace emulated {
struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
inline thread_local Configuration shape{};
inline thread_local uint8_t tiles[8][16][64];

inline void require(bool fine, const char* what) {
    if (fine) return;
    std::fprintf(stderr, "emulated tile unit: %s\n", what);
    std::abort();
}
inline bool is(const char* how) {
    const char* value = std::getenv("EMULATED_TILES");
    return value && !std::strcmp(value, how);
}
inline void configured(int t) { require(shape.palette == 1 && shape.rows[t] > 0 && shape.row_bytes[t] > 0, "a tile without a shape"); }

inline void load_configuration(const void* from) {
    require(reinterpret_cast<uintptr_t>(from) % 64 == 0, "a configuration that is not aligned");  // the unit's own is free of this
    std::memcpy(&shape, from, sizeof shape);
    require(shape.palette == 1 && shape.start_row == 0, "palette or start row");
    for (uint8_t byte : shape.reserved) require(byte == 0, "reserved bytes");
    for (int t = 0; t < 16; ++t)
        require(t < 8 ? shape.rows[t] <= 16 && shape.row_bytes[t] <= 64 && !shape.rows[t] == !shape.row_bytes[t] : !shape.rows[t] && !shape.row_bytes[t], "sizes");
    std::memset(tiles, 0, sizeof tiles);
}
inline void release() { shape = {}; }
inline void zero(int t) {
    configured(t);
    std::memset(tiles[t], 0, sizeof tiles[t]);
}
inline void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int r = 0; r < shape.rows[t]; ++r) std::memcpy(tiles[t][r], static_cast<const char*>(from) + r * stride, shape.row_bytes[t]);
}
inline void store(int t, void* into, int64_t stride) {
    configured(t);
    for (int r = 0; r < shape.rows[t]; ++r) std::memcpy(static_cast<char*>(into) + r * stride, tiles[t][r], shape.row_bytes[t]);
}
inline float widened(const uint8_t* from) {
    const uint32_t bits = uint32_t(from[0]) << 16 | uint32_t(from[1]) << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void multiply(int c, int a, int b) {
    for (int t : {c, a, b}) configured(t);
    require(c != a && a != b && b != c && shape.rows[a] == shape.rows[c] && shape.rows[b] * 4 == shape.row_bytes[a] && shape.row_bytes[b] == shape.row_bytes[c], "shapes of a product");
    for (int m = 0; m < shape.rows[c]; ++m)
        for (int n = 0; n < shape.row_bytes[c] / 4; ++n) {
            float sum;
            std::memcpy(&sum, tiles[c][m] + 4 * n, 4);
            for (int k = 0; k < shape.rows[b]; ++k)
                for (int half : {0, 2}) sum += widened(tiles[a][m] + 4 * k + half) * widened(tiles[b][k] + 4 * n + half);
            if (is("wrong")) sum += 1;
            std::memcpy(tiles[c][m] + 4 * n, &sum, 4);
        }
    __atomic_fetch_add(&emulated_products, 1, __ATOMIC_RELAXED);
}
}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_configuration
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#define syscall(...) (emulated::is("refused") ? -1L : 0L)
