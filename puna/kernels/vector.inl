// Vectors of WIDTH floats and what all kernels do with them.
//
// Included once per instruction set, inside a namespace that defines WIDTH, before the kernels.

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int Integers __attribute__((vector_size(4 * WIDTH)));
typedef Vector Unaligned __attribute__((aligned(4), may_alias));

static inline Vector load(const float *at) { return *reinterpret_cast<const Unaligned *>(at); }
static inline void store(float *at, Vector value) { *reinterpret_cast<Unaligned *>(at) = value; }

// e^x for x <= 0, to about one unit in the last place; below -87 it is 1e-38 instead of smaller.
// Cody and Waite's reduction by powers of two, then a polynomial of degree six (Cephes expf).
static inline Vector exponential(Vector x) {
    x = x < -87.0f ? Vector{} - 87.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    Vector shifted = x * 1.44269504f + shift;
    Vector power = shifted - shift;
    Vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    Vector sum = Vector{} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return (Vector)((Integers)sum + ((Integers)shifted << 23));
}

static inline long padded(long count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

static inline float sum_of(Vector v) {
    float total = 0;
    for (int i = 0; i < WIDTH; i++) total += v[i];
    return total;
}

static inline float largest_of(Vector v) {
    float best = v[0];
    for (int i = 1; i < WIDTH; i++) best = v[i] > best ? v[i] : best;
    return best;
}
