// Attention within windows on CPUs, from the projection's output to the next one's input: q, k and v are read where they
// lie in tokens x 3C, and their gradients written there. One item is a window and a head; everything of it stays in the
// first-level cache. Scores are key-major, as in attention.cpp, so the bias is kept transposed. Called by
// dattrain/ops/cpp/bindings.py.

#include "products.h"

namespace {

template <class T, class S> struct Windows {
    const S *qkv, *grad_out, *out_in;
    const T *bias, *mask, *lse_in;
    S *out, *grad_qkv;
    T *lse, *grad_bias;
    int64_t items, windows, heads, area, dim;  // items: images x windows
    T scale;
    int64_t channels() const { return heads * dim; }
};

template <class T, class S> struct WindowWorker {
    static constexpr int L = lanes<T>;
    const Windows<T, S>& c;
    const int64_t dim, block, pairs;  // pairs: numbers of one head's bias
    std::vector<T> scores, grads, acc, acc_k, acc_v, bias, grad_bias, column_sum, line, delta;
    Dot<T, S> dot;
    Weighted<T, S> weighted;

    WindowWorker(const Windows<T, S>& call, bool backward)
        : c(call), dim(round_up(call.dim, L)), block(round_up(call.area, L)), pairs(c.area * block) {
        scores.assign(pairs, 0);
        bias.assign(c.heads * pairs, 0);
        for (int64_t head = 0; head < c.heads; ++head)
            for (int64_t query = 0; query < c.area; ++query)
                for (int64_t key = 0; key < c.area; ++key) bias[head * pairs + key * block + query] = c.bias[(head * c.area + query) * c.area + key] / c.scale;
        acc.assign(block * dim, 0);
        column_sum.assign(block, 0);
        line.assign(block, 0);
        if (!backward) return;
        grads.assign(pairs, 0);
        grad_bias.assign(c.heads * pairs, 0);
        for (auto* each : {&acc_k, &acc_v}) each->assign(block * dim, 0);
        delta.assign(block, 0);
    }

    void unpack(const T* from, T factor, S* into, int64_t stride) const {
        for (int64_t i = 0; i < c.area; ++i) narrow_all(from + i * dim, c.dim, factor, into + i * stride);
    }

    void finish(T* into) const {
        for (int64_t head = 0; head < c.heads; ++head)
            for (int64_t query = 0; query < c.area; ++query)
                for (int64_t key = 0; key < c.area; ++key) into[(head * c.area + query) * c.area + key] = grad_bias[head * pairs + key * block + query];
    }

    // Scores before they are scaled, bias and mask included.
    void block_scores(int64_t item, int64_t head) {
        const S* q = c.qkv + item * c.area * 3 * c.channels() + head * c.dim;
        std::memcpy(scores.data(), bias.data() + head * pairs, pairs * sizeof(T));
        if (c.mask) {
            // The mask is symmetric: regions differ or they do not.
            const T* mask = c.mask + item % c.windows * c.area * c.area;
            const T inverse = 1 / c.scale;
            for (int64_t key = 0; key < c.area; ++key)
                for (int64_t query = 0; query < c.area; ++query) scores[key * block + query] += mask[key * c.area + query] * inverse;
        }
        dot.template operator()<true>(c.area, q + c.channels(), 3 * c.channels(), c.area, q, 3 * c.channels(), c.dim, scores.data(), block);
    }

    void forward(int64_t item, int64_t head) {
        block_scores(item, head);
        const S* v = c.qkv + item * c.area * 3 * c.channels() + 2 * c.channels() + head * c.dim;
        exponentials(scores.data(), c.area, block, block, c.scale, line.data(), column_sum.data());
        weighted.template operator()<false>(c.area, scores.data(), 1, block, c.area, v, 3 * c.channels(), c.dim, acc.data());
        S* out = c.out + item * c.area * c.channels() + head * c.dim;
        T* lse = c.lse + (item * c.heads + head) * c.area;
        for (int64_t i = 0; i < c.area; ++i) {
            narrow_all(acc.data() + i * dim, c.dim, 1 / column_sum[i], out + i * c.channels());
            lse[i] = line[i] * c.scale + std::log(column_sum[i]);
        }
    }

    void backward(int64_t item, int64_t head) {
        block_scores(item, head);
        const S* q = c.qkv + item * c.area * 3 * c.channels() + head * c.dim;
        const int64_t at = item * c.area * c.channels() + head * c.dim;
        const T* lse = c.lse_in + (item * c.heads + head) * c.area;
        std::copy(lse, lse + c.area, line.begin());
        row_products(c.grad_out + at, c.channels(), c.out_in + at, c.channels(), c.area, c.dim, delta.data());
        dot.template operator()<false>(c.area, q + 2 * c.channels(), 3 * c.channels(), c.area, c.grad_out + at, c.channels(), c.dim, grads.data(), block);
        T* into_bias = grad_bias.data() + head * pairs;
        for (int64_t i = 0; i < pairs; i += L) {
            const int64_t n = i % block;
            const V<T> weight = exponential(load(scores.data() + i) * c.scale - load(line.data() + n));
            const V<T> g = weight * (load(grads.data() + i) - load(delta.data() + n));
            store(scores.data() + i, weight);
            store(grads.data() + i, g);
            store(into_bias + i, load(into_bias + i) + g);
        }
        // Columns past the last query hold weights of no query: the products below stop before them.
        weighted.template operator()<false>(c.area, scores.data(), block, 1, c.area, c.grad_out + at, c.channels(), c.dim, acc_v.data());
        weighted.template operator()<false>(c.area, grads.data(), block, 1, c.area, q, 3 * c.channels(), c.dim, acc_k.data());
        weighted.template operator()<false>(c.area, grads.data(), 1, block, c.area, q + c.channels(), 3 * c.channels(), c.dim, acc.data());
        S* into = c.grad_qkv + item * c.area * 3 * c.channels() + head * c.dim;
        unpack(acc.data(), c.scale, into, 3 * c.channels());
        unpack(acc_k.data(), c.scale, into + c.channels(), 3 * c.channels());
        unpack(acc_v.data(), 1, into + 2 * c.channels(), 3 * c.channels());
    }
};

template <class T, class S>
int windows(void** p, const int64_t* n, double scale, int64_t threads) try {
    Windows<T, S> c{};
    c.qkv = (const S*)p[0]; c.bias = (const T*)p[1]; c.mask = (const T*)p[2];
    c.out = (S*)p[3]; c.out_in = (const S*)p[3]; c.lse = (T*)p[4]; c.lse_in = (const T*)p[4];
    c.grad_out = (const S*)p[5]; c.grad_qkv = (S*)p[6]; c.grad_bias = (T*)p[7];
    c.items = n[0]; c.windows = n[1]; c.heads = n[2]; c.area = n[3]; c.dim = n[4];
    c.scale = T(scale);
    const bool backward = c.grad_out != nullptr;
    // All heads of a window in a row, whose tokens then come from memory once; but where the biases of all heads outgrow the
    // second-level cache, some windows with each head.
    const int64_t together = c.heads * c.area * c.area * int64_t(sizeof(T)) > (1 << 18) ? 8 : 1;
    const int64_t units = (c.items + together - 1) / together * c.heads;
    threads = std::max<int64_t>(1, std::min(threads, units));
    on_threads(threads, [&](int64_t thread) {
        WindowWorker<T, S> worker(c, backward);
        for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
            const int64_t head = unit % c.heads, first = unit / c.heads * together;
            for (int64_t item = first; item < std::min(first + together, c.items); ++item) {
                if (backward) worker.backward(item, head);
                else worker.forward(item, head);
            }
        }
        if (backward) worker.finish(c.grad_bias + thread * c.heads * c.area * c.area);
    });
    return 0;
} catch (...) {
    return 1;
}

}  // namespace

// Status 0: done; 1: no memory for work space. p: qkv, bias, mask, out, lse, grad_out, grad_qkv, grad_bias of each thread.
// n: images x windows, windows, heads, tokens of a window, channels of a head.
extern "C" {
int dattrain_windows_f32(void** p, const int64_t* n, double x, int64_t t) { return windows<float, float>(p, n, x, t); }
int dattrain_windows_f64(void** p, const int64_t* n, double x, int64_t t) { return windows<double, double>(p, n, x, t); }
int dattrain_windows_bf16(void** p, const int64_t* n, double x, int64_t t) { return windows<float, bf16>(p, n, x, t); }
}
