// Maps on CPUs, B x H x W x C in memory: bilinear sampling at points, and the depthwise convolution whose kernels groups of
// channels share. One item is an image and a group; what an item needs lies in a padded copy in the computing type, so the
// inner loops are over whole vectors of channels and know no borders. Called by dattrain/ops/cpp/bindings.py.

#include "native.h"

namespace {

// Bilinear taps of a point, corners aligned; the weight of a tap outside the map is zero, and its place is the map's first.
template <class T> struct Point {
    int64_t place[4];
    T weight[4], along_y[4], along_x[4];

    Point(T y, T x, int64_t height, int64_t width, int64_t step) {
        const T half_y = T(height - 1) / 2, half_x = T(width - 1) / 2;
        const T at_y = (y + 1) * half_y, at_x = (x + 1) * half_x;
        // Far outside it does not matter where; NaN fails every comparison below and stays in the weights.
        const T low_y = std::floor(at_y), low_x = std::floor(at_x), fy = at_y - low_y, fx = at_x - low_x;
        const T by_y[2] = {1 - fy, fy}, by_x[2] = {1 - fx, fx};
        for (int i = 0; i < 4; ++i) {
            const int dy = i / 2, dx = i % 2;
            const T row = low_y + dy, column = low_x + dx;
            const bool outside = row < 0 || row > T(height - 1) || column < 0 || column > T(width - 1);
            const bool inside = row >= 0 && row <= T(height - 1) && column >= 0 && column <= T(width - 1);
            place[i] = inside ? (int64_t(row) * width + int64_t(column)) * step : 0;
            weight[i] = outside ? T(0) : by_y[dy] * by_x[dx];
            along_y[i] = outside ? T(0) : (dy ? by_x[dx] : -by_x[dx]) * half_y;
            along_x[i] = outside ? T(0) : (dx ? by_y[dy] : -by_y[dy]) * half_x;
        }
    }
};

template <class T, class S>
void sample(const S* x, const T* positions, S* out, int64_t image, int64_t group, const int64_t* n) {
    const int64_t groups = n[1], height = n[2], width = n[3], channels = n[4], points = n[5], own = channels / groups;
    const S* map = x + image * height * width * channels + group * own;
    for (int64_t i = 0; i < points; ++i) {
        const T* p = positions + ((image * groups + group) * points + i) * 2;
        const Point<T> at(p[0], p[1], height, width, channels);
        const S *a = map + at.place[0], *b = map + at.place[1], *c = map + at.place[2], *d = map + at.place[3];
        S* into = out + (image * points + i) * channels + group * own;
        for (int64_t k = 0; k < own; ++k)
            into[k] = narrow<S>(at.weight[0] * widen(a[k]) + at.weight[1] * widen(b[k]) + at.weight[2] * widen(c[k]) + at.weight[3] * widen(d[k]));
    }
}

// line, grad_map: work space of ``own`` and of height * width * own numbers.
template <class T, class S>
void sample_backward(const S* grad, const S* x, const T* positions, S* grad_x, T* grad_positions, T* line, T* grad_map, int64_t image, int64_t group, const int64_t* n) {
    constexpr int L = lanes<T>;
    const int64_t groups = n[1], height = n[2], width = n[3], channels = n[4], points = n[5], own = channels / groups;
    const S* map = x + image * height * width * channels + group * own;
    std::fill(grad_map, grad_map + height * width * own, T(0));
    for (int64_t i = 0; i < points; ++i) {
        const int64_t index = ((image * groups + group) * points + i) * 2;
        const T* p = positions + index;
        const Point<T> at(p[0], p[1], height, width, channels);
        widen_all(grad + (image * points + i) * channels + group * own, own, line);
        T along_y = 0, along_x = 0;
        for (int tap = 0; tap < 4; ++tap) {
            // A tap outside reads zeros and has nothing to give back.
            if (at.weight[tap] == 0 && at.along_y[tap] == 0 && at.along_x[tap] == 0) continue;
            const S* from = map + at.place[tap];
            T* to = grad_map + at.place[tap] / channels * own;
            T partial[L] = {};
            int64_t k = 0;
            for (; k + L <= own; k += L)
                for (int j = 0; j < L; ++j) {
                    partial[j] += line[k + j] * widen(from[k + j]);
                    to[k + j] += at.weight[tap] * line[k + j];
                }
            for (int j = 0; k + j < own; ++j) {
                partial[j] += line[k + j] * widen(from[k + j]);
                to[k + j] += at.weight[tap] * line[k + j];
            }
            T dot = 0;
            for (int j = 0; j < L; ++j) dot += partial[j];
            along_y += dot * at.along_y[tap];
            along_x += dot * at.along_x[tap];
        }
        grad_positions[index] = along_y;
        grad_positions[index + 1] = along_x;
    }
    S* into = grad_x + image * height * width * channels + group * own;
    for (int64_t pixel = 0; pixel < height * width; ++pixel) narrow_all(grad_map + pixel * own, own, T(1), into + pixel * channels);
}

// Depthwise convolution ---------------------------------------------------------------------------------------------

struct Sizes {
    int64_t batch, groups, height, width, own, stride, kernel, out_height, out_width;
    int64_t padding() const { return kernel / 2; }
    int64_t channels() const { return groups * own; }
    int64_t padded_width() const { return std::max(width, (out_width - 1) * stride + 1) + 2 * padding(); }
    int64_t padded_height() const { return std::max(height, (out_height - 1) * stride + 1) + 2 * padding(); }
};

template <class T, class S> struct Depthwise {
    static constexpr int L = lanes<T>;
    const Sizes n;
    const int64_t depth, line;  // channels of an item in whole vectors, one row of the padded map
    std::vector<T> map, grad, grad_map, weight, bias, grad_weight, grad_bias;

    // weight: own x kernel x kernel; kept as taps x channels.
    Depthwise(const Sizes& sizes, const T* w, const T* b, bool backward)
        : n(sizes), depth(round_up(n.own, L)), line(n.padded_width() * depth) {
        const int64_t taps = n.kernel * n.kernel;
        map.assign(n.padded_height() * line, 0);
        weight.assign(taps * depth, 0);
        bias.assign(depth, 0);
        for (int64_t c = 0; c < n.own; ++c) {
            bias[c] = b[c];
            for (int64_t tap = 0; tap < taps; ++tap) weight[tap * depth + c] = w[c * taps + tap];
        }
        grad.assign(n.out_width * depth, 0);
        if (!backward) return;
        grad_map.assign(n.padded_height() * line, 0);
        grad_weight.assign(taps * depth, 0);
        grad_bias.assign(depth, 0);
    }

    void read(const S* x) {
        for (int64_t y = 0; y < n.height; ++y)
            for (int64_t i = 0; i < n.width; ++i)
                widen_all(x + (y * n.width + i) * n.channels(), n.own, map.data() + (y + n.padding()) * line + (i + n.padding()) * depth);
    }

    template <int K> void forward(const S* x, S* out) {
        read(x);
        for (int64_t y = 0; y < n.out_height; ++y)
            for (int64_t i = 0; i < n.out_width; ++i) {
                T* sum = grad.data();
                for (int64_t c = 0; c < depth; c += L) {
                    const T* from = map.data() + y * n.stride * line + i * n.stride * depth + c;
                    V<T> total = load(bias.data() + c);
                    for (int ky = 0; ky < K; ++ky)
                        for (int kx = 0; kx < K; ++kx) total += load(weight.data() + (ky * K + kx) * depth + c) * load(from + ky * line + kx * depth);
                    store(sum + c, total);
                }
                narrow_all(sum, n.own, T(1), out + (y * n.out_width + i) * n.channels());
            }
    }

    template <int K> void backward(const S* grad_out, const S* x, S* grad_x) {
        read(x);
        std::fill(grad_map.begin(), grad_map.end(), T(0));
        for (int64_t y = 0; y < n.out_height; ++y) {
            for (int64_t i = 0; i < n.out_width; ++i) widen_all(grad_out + (y * n.out_width + i) * n.channels(), n.own, grad.data() + i * depth);
            for (int64_t c = 0; c < depth; c += L) {
                V<T> sum{};
                for (int64_t i = 0; i < n.out_width; ++i) sum += load(grad.data() + i * depth + c);
                store(grad_bias.data() + c, load(grad_bias.data() + c) + sum);
                for (int ky = 0; ky < K; ++ky) {
                    const T* from = map.data() + (y * n.stride + ky) * line + c;
                    T* to = grad_map.data() + (y * n.stride + ky) * line + c;
                    V<T> by[K], total[K];
                    for (int kx = 0; kx < K; ++kx) {
                        by[kx] = load(weight.data() + (ky * K + kx) * depth + c);
                        total[kx] = V<T>{};
                    }
                    for (int64_t i = 0; i < n.out_width; ++i) {
                        const V<T> g = load(grad.data() + i * depth + c);
                        const int64_t at = i * n.stride * depth;
                        for (int kx = 0; kx < K; ++kx) {
                            total[kx] += g * load(from + at + kx * depth);
                            store(to + at + kx * depth, load(to + at + kx * depth) + g * by[kx]);
                        }
                    }
                    for (int kx = 0; kx < K; ++kx) {
                        T* t = grad_weight.data() + (ky * K + kx) * depth + c;
                        store(t, load(t) + total[kx]);
                    }
                }
            }
        }
        for (int64_t y = 0; y < n.height; ++y)
            for (int64_t i = 0; i < n.width; ++i)
                narrow_all(grad_map.data() + (y + n.padding()) * line + (i + n.padding()) * depth, n.own, T(1), grad_x + (y * n.width + i) * n.channels());
    }
};

template <int K, class T, class S> void depthwise(void** p, const Sizes& n, int64_t threads) {
    const S *x = (const S*)p[0], *grad_out = (const S*)p[4];
    S *out = (S*)p[3], *grad_x = (S*)p[5];
    const bool backward = grad_out != nullptr;
    const int64_t items = n.batch * n.groups, taps = K * K;
    threads = std::max<int64_t>(1, std::min(threads, items));
    on_threads(threads, [&](int64_t thread) {
        Depthwise<T, S> worker(n, (const T*)p[1], (const T*)p[2], backward);
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item) {
            const int64_t image = item / n.groups, group = item % n.groups;
            const int64_t in = image * n.height * n.width * n.channels() + group * n.own;
            const int64_t to = image * n.out_height * n.out_width * n.channels() + group * n.own;
            if (backward) worker.template backward<K>(grad_out + to, x + in, grad_x + in);
            else worker.template forward<K>(x + in, out + to);
        }
        if (!backward) return;
        T* grad_weight = (T*)p[6] + thread * n.own * taps;
        for (int64_t c = 0; c < n.own; ++c)
            for (int64_t tap = 0; tap < taps; ++tap) grad_weight[c * taps + tap] = worker.grad_weight[tap * worker.depth + c];
        std::copy(worker.grad_bias.begin(), worker.grad_bias.begin() + n.own, (T*)p[7] + thread * n.own);
    });
}

template <class T, class S> int depthwise(void** p, const int64_t* s, int64_t threads) try {
    const Sizes n{s[0], s[1], s[2], s[3], s[4] / s[1], s[5], s[6], (s[2] + s[5] - 1) / s[5], (s[3] + s[5] - 1) / s[5]};
    switch (n.kernel) {
        case 1: depthwise<1, T, S>(p, n, threads); return 0;
        case 3: depthwise<3, T, S>(p, n, threads); return 0;
        case 5: depthwise<5, T, S>(p, n, threads); return 0;
        case 7: depthwise<7, T, S>(p, n, threads); return 0;
        case 9: depthwise<9, T, S>(p, n, threads); return 0;
    }
    return 2;
} catch (...) {
    return 1;
}

template <class T, class S> int sample(void** p, const int64_t* n, int64_t threads) try {
    const bool backward = p[3] != nullptr;
    const int64_t items = n[0] * n[1], own = n[4] / n[1];
    threads = std::max<int64_t>(1, std::min(threads, items));
    std::vector<T> space(backward ? threads * (own + n[2] * n[3] * own) : 0);
    on_threads(threads, [&](int64_t thread) {
        T* line = space.data() + thread * (own + n[2] * n[3] * own);
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; ++item) {
            const int64_t image = item / n[1], group = item % n[1];
            if (backward) sample_backward<T, S>((const S*)p[3], (const S*)p[0], (const T*)p[1], (S*)p[4], (T*)p[5], line, line + own, image, group, n);
            else sample<T, S>((const S*)p[0], (const T*)p[1], (S*)p[2], image, group, n);
        }
    });
    return 0;
} catch (...) {
    return 1;
}

}  // namespace

// Status 0: done; 1: no memory for work space.
extern "C" {
// p: x, positions, out, grad_out, grad_x, grad_positions. n: images, groups, height, width, channels, points.
int dattrain_sample_f32(void** p, const int64_t* n, int64_t t) { return sample<float, float>(p, n, t); }
int dattrain_sample_f64(void** p, const int64_t* n, int64_t t) { return sample<double, double>(p, n, t); }
int dattrain_sample_bf16(void** p, const int64_t* n, int64_t t) { return sample<float, bf16>(p, n, t); }
// p: x, weight, bias, out, grad_out, grad_x, grad_weight and grad_bias of each thread. n: images, groups, height, width,
// channels, stride, kernel.
int dattrain_depthwise_f32(void** p, const int64_t* n, int64_t t) { return depthwise<float, float>(p, n, t); }
int dattrain_depthwise_f64(void** p, const int64_t* n, int64_t t) { return depthwise<double, double>(p, n, t); }
int dattrain_depthwise_bf16(void** p, const int64_t* n, int64_t t) { return depthwise<float, bf16>(p, n, t); }
}
