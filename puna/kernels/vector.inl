// Vectors of WIDTH floats and what all kernels do with them.
//
// Included once per instruction set, inside a namespace that defines WIDTH, before the kernels.

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int Integers __attribute__((vector_size(4 * WIDTH)));
typedef unsigned short Halves __attribute__((vector_size(2 * WIDTH)));
typedef signed char Bytes __attribute__((vector_size(WIDTH)));
typedef Vector Unaligned __attribute__((aligned(4), may_alias));
typedef Integers UnalignedIntegers __attribute__((aligned(1), may_alias));
typedef Halves UnalignedHalves __attribute__((aligned(2), may_alias));
typedef Bytes UnalignedBytes __attribute__((aligned(1), may_alias));

static inline Vector load(const float *at) { return *reinterpret_cast<const Unaligned *>(at); }
static inline void store(float *at, Vector value) { *reinterpret_cast<Unaligned *>(at) = value; }
static inline Integers load_integers(const void *at) { return *static_cast<const UnalignedIntegers *>(at); }
static inline void store_integers(void *at, Integers value) { *static_cast<UnalignedIntegers *>(at) = value; }

// bfloat16 is the upper half of a float.
static inline Vector load(const unsigned short *at) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves *>(at), Integers) << 16);
}
static inline void store(unsigned short *at, Vector value) {  // to the nearest, ties to even
    Integers bits = (Integers)value;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *reinterpret_cast<UnalignedHalves *>(at) = __builtin_convertvector(bits, Halves);
}
static inline float widen(float value) { return value; }
static inline float widen(unsigned short value) {
    const int bits = value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

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

// 1 / (1 + e^-x), without overflow.
static inline Vector logistic(Vector x) {
    const Vector small = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? small : Vector{} + 1.0f) / (1.0f + small);
}

static inline long padded(long count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

// Each lane plus the one that is HALF, HALF / 2, ... lanes away.
template <int HALF, typename V>
static inline V add_halves(V v) {
    if constexpr (HALF > 0) {
#if WIDTH == 16
        constexpr Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif WIDTH == 8
        constexpr Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
        constexpr Integers lanes = {0, 1, 2, 3};
#endif
        return add_halves<HALF / 2>(v + __builtin_shuffle(v, lanes ^ HALF));
    }
    return v;
}
template <typename V>
static inline auto sum_of(V v) {
    return add_halves<WIDTH / 2>(v)[0];
}

static inline float largest_of(Vector v) {
    float best = v[0];
    for (int i = 1; i < WIDTH; i++) best = v[i] > best ? v[i] : best;
    return best;
}

// Transposes a square of parts of UNIT lanes: the vectors' halves are interleaved as often as they can be halved.
template <int UNIT = 1, int COUNT>
static inline void transpose(Vector (&square)[COUNT]) {
    static_assert(UNIT * COUNT == WIDTH);
    Integers low, high;
    for (int i = 0; i < WIDTH; i++) low[i] = (i / UNIT / 2 + i / UNIT % 2 * COUNT) * UNIT + i % UNIT, high[i] = low[i] + WIDTH / 2;
#pragma GCC unroll 4
    for (int half = 1; half < COUNT; half *= 2) {
        Vector next[COUNT];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT / 2; i++) {
            next[2 * i] = __builtin_shuffle(square[i], square[i + COUNT / 2], low);
            next[2 * i + 1] = __builtin_shuffle(square[i], square[i + COUNT / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) square[i] = next[i];
    }
}
