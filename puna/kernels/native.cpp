// C interface of the kernels. Each is compiled once per instruction set; the caller says which (see loader.py).

#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// Queries whose scores are held at once.
constexpr long QUERIES = 24;

// Sizes count floats. A row is what lies between the same element of two neighbouring tokens.
struct Attention {
    const float *q, *k, *v;  // [tokens, heads, size], [tokens, groups, size] twice; the two inner axes are dense
    long q_row, k_row, v_row;
    const long *starts;  // of each document, and the end of the last
    long documents, longest, heads, groups, size;
    float scale;
    float *o;        // [tokens, heads, size], dense
    float *log_sum;  // [tokens, heads]: logarithm of the softmax's denominator
};

struct AttentionGradient {
    const float *o;  // dL/do
    long o_row;
    float *q, *k, *v;  // dense
};

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

// A linear map as puna.compress stores it, or as plain floats.
struct Map {
    long kind, outputs, inputs;
    long group;         // inputs that share a scale
    long wide_scales;   // whether scales are float32, or else bfloat16
    long y_row;         // between two rows of results
    const void *weights, *scales;
    const float *bias;  // or null
};

struct Layer {
    const float *attention_norm, *feed_forward_norm, *query_norm, *key_norm;  // the last two may be null
    Map query, key, value, output, gate, up, down;
};

// New tokens of several sequences, and the model and cache that they go through.
struct Forward {
    long layers, dim, heads, groups, head_size;
    float eps;
    const Layer *layer;
    const float *norm, *cosines, *sines;  // the last two are [positions, head_size / 2]
    void *const *keys, *const *values;    // of each layer [blocks, block_size, groups, head_size]
    long block_size;
    long wide_cache;  // whether these are float32, or else bfloat16
    long rows, sequences;
    float *x;            // [rows, dim]
    const long *tables;  // for each sequence its blocks
    long table_row;
    const long *starts, *firsts;  // position of its first new token, and the row of it; one more for the end
};

struct Scratch {
    float *data;
    explicit Scratch(long count) : data(static_cast<float *>(aligned_alloc(64, (count * 4 + 63) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,fma,avx2")
namespace avx512 {
#define WIDTH 16
#include "vector.inl"
#include "attention.inl"
#include "cross_entropy.inl"
#include "layers.inl"
#include "integers.inl"
#include "inner.inl"
#include "panels.inl"
#include "floats.inl"
#include "decoder.inl"
#undef WIDTH
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define WIDTH 8
#include "vector.inl"
#include "attention.inl"
#include "cross_entropy.inl"
#include "layers.inl"
#include "integers.inl"
#include "inner.inl"
#include "panels.inl"
#include "floats.inl"
#include "decoder.inl"
#undef WIDTH
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define WIDTH 4
#include "vector.inl"
#include "attention.inl"
#include "cross_entropy.inl"
#include "layers.inl"
#include "integers.inl"
#include "inner.inl"
#include "panels.inl"
#include "floats.inl"
#include "decoder.inl"
#undef WIDTH
}  // namespace portable

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

}  // namespace

extern "C" {

// The best instruction set of this processor, as a Level.
int puna_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

void puna_attention_forward(int level, const float *q, long q_row, const float *k, long k_row, const float *v,
                            long v_row, const long *starts, long documents, long longest, long heads, long groups,
                            long size, float scale, float *o, float *log_sum) {
    const Attention a{q, k, v, q_row, k_row, v_row, starts, documents, longest, heads, groups, size, scale, o, log_sum};
#if defined(__x86_64__)
    if (level == AVX512) return avx512::forward(a);
    if (level == AVX2) return avx2::forward(a);
#endif
    portable::forward(a);
}

void puna_attention_backward(int level, const float *q, long q_row, const float *k, long k_row, const float *v,
                             long v_row, const long *starts, long documents, long longest, long heads, long groups,
                             long size, float scale, float *o, float *log_sum, const float *o_grad, long o_grad_row,
                             float *q_grad, float *k_grad, float *v_grad) {
    const Attention a{q, k, v, q_row, k_row, v_row, starts, documents, longest, heads, groups, size, scale, o, log_sum};
    const AttentionGradient g{o_grad, o_grad_row, q_grad, k_grad, v_grad};
#if defined(__x86_64__)
    if (level == AVX512) return avx512::backward(a, g);
    if (level == AVX2) return avx2::backward(a, g);
#endif
    portable::backward(a, g);
}

// In place: logits become the gradient. `losses` takes one float a row.
void puna_cross_entropy(int level, float *logits, long rows, long vocabulary, const long *labels, float *losses) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::cross_entropy(logits, rows, vocabulary, labels, losses);
    if (level == AVX2) return avx2::cross_entropy(logits, rows, vocabulary, labels, losses);
#endif
    portable::cross_entropy(logits, rows, vocabulary, labels, losses);
}

void puna_norm_forward(int level, const float *x, const float *weight, long rows, long size, float eps, float *y, float *inverse) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::norm_forward(x, weight, rows, size, eps, y, inverse);
    if (level == AVX2) return avx2::norm_forward(x, weight, rows, size, eps, y, inverse);
#endif
    portable::norm_forward(x, weight, rows, size, eps, y, inverse);
}

void puna_norm_backward(int level, const float *x, const float *weight, const float *inverse, const float *y_grad, long rows,
                        long size, long parts, float *x_grad, float *weight_grads) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::norm_backward(x, weight, inverse, y_grad, rows, size, parts, x_grad, weight_grads);
    if (level == AVX2) return avx2::norm_backward(x, weight, inverse, y_grad, rows, size, parts, x_grad, weight_grads);
#endif
    portable::norm_backward(x, weight, inverse, y_grad, rows, size, parts, x_grad, weight_grads);
}

void puna_swiglu_forward(int level, const float *joint, long rows, long size, float *y) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::swiglu_forward(joint, rows, size, y);
    if (level == AVX2) return avx2::swiglu_forward(joint, rows, size, y);
#endif
    portable::swiglu_forward(joint, rows, size, y);
}

void puna_swiglu_backward(int level, const float *joint, const float *y_grad, long rows, long size, float *joint_grad) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::swiglu_backward(joint, y_grad, rows, size, joint_grad);
    if (level == AVX2) return avx2::swiglu_backward(joint, y_grad, rows, size, joint_grad);
#endif
    portable::swiglu_backward(joint, y_grad, rows, size, joint_grad);
}

void puna_rotate(int level, const float *x, long x_row, const float *cosines, const float *sines, long tokens, long heads,
                 long size, int back, float *y) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::rotate(x, x_row, cosines, sines, tokens, heads, size, back, y);
    if (level == AVX2) return avx2::rotate(x, x_row, cosines, sines, tokens, heads, size, back, y);
#endif
    portable::rotate(x, x_row, cosines, sines, tokens, heads, size, back, y);
}

void puna_multiply(int level, const Map *map, const float *x, long rows, float *y) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::multiply_alone(*map, x, rows, y);
    if (level == AVX2) return avx2::multiply_alone(*map, x, rows, y);
#endif
    portable::multiply_alone(*map, x, rows, y);
}

void puna_forward(int level, const Forward *forward) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::forward(*forward);
    if (level == AVX2) return avx2::forward(*forward);
#endif
    portable::forward(*forward);
}
}
