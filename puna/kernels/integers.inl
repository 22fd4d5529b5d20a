// Activations rounded to 8-bit integers, to be multiplied with weights stored as integers of 8 or 4 bits.
//
// Included once per instruction set, after vector.inl.
//
// Weights stay as they are stored. To multiply with unsigned bytes, which is what processors do best, each weight is read
// as weight + OFFSET (128, or 8 as 4-bit weights are stored), and OFFSET times the sum of the activations is taken off.
//
// For few rows, outputs are inner products along the stored rows (inner.inl); for many, the weights of some outputs are
// laid out lane by lane first and used by all rows (panels.inl).

constexpr long SPAN = 128;  // inputs are a multiple of this: four of the smallest groups
constexpr long SUM = 32;    // inputs of the smallest group
constexpr long FEW = 4;     // rows for which laying out panels does not pay

// Adds to each lane the products of its four bytes, of which `u` has unsigned and `s` signed ones.
static inline Integers dot(Integers sum, Integers u, Integers s) {
#if WIDTH == 16
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif WIDTH == 8
    const __m256i even = _mm256_and_si256((__m256i)u, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16((__m256i)u, 8);
    const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)s, 8), 8), s_odd = _mm256_srai_epi16((__m256i)s, 8);
    return sum + (Integers)_mm256_madd_epi16(even, s_even) + (Integers)_mm256_madd_epi16(odd, s_odd);
#else
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) sum += (u >> 8 * byte & 255) * (s << (24 - 8 * byte) >> 24);
    return sum;
#endif
}

static inline Integers same(int value) { return Integers{} + value; }

// Four integers, again and again.
static inline Integers repeated(const void *four) {
#if WIDTH == 16
    return (Integers)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i *>(four)));
#elif WIDTH == 8
    return (Integers)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i *>(four)));
#else
    return load_integers(four);
#endif
}

// Rows of activations in the order in which weights of one kind are multiplied. Words are four bytes, and there are 32 in
// a span. For few rows they stand as the weights' bytes do: in a word the inputs that follow each other with 8-bit
// weights; with 4-bit weights those at even places, which make up the first half of a span, or those at odd ones. For
// many rows, word i of each of the span's four groups stand together, and 4-bit weights' even and odd words alternate.
struct Ordered {
    signed char *values;  // [rows, inputs]
    int *lanes;  // [rows, inputs / 4 or 8]: minus OFFSET times the sum of the inputs whose weights share a lane
    int *sums;   // [rows, inputs / SUM]: minus OFFSET times the sum of these inputs
};

struct Rounded {
    long rows, inputs;
    float *scale;  // [rows]
    Ordered bytes, nibbles;  // for weights of 8 and 4 bits
};

// Numbers of 32 bits that a `Rounded` takes.
static inline long numbers_of(long rows, long inputs) { return rows * (1 + inputs * 2 / 4 + inputs / 4 + inputs / 8 + inputs * 2 / SUM); }

static inline Rounded rounded_in(float *memory, long rows, long inputs) {
    int *at = reinterpret_cast<int *>(memory);
    const auto take = [&](long count) { return at += rows * count, at - rows * count; };
    signed char *bytes = reinterpret_cast<signed char *>(take(inputs / 4)), *nibbles = reinterpret_cast<signed char *>(take(inputs / 4));
    int *byte_lanes = take(inputs / 4), *nibble_lanes = take(inputs / 8), *byte_sums = take(inputs / SUM), *nibble_sums = take(inputs / SUM);
    float *scale = reinterpret_cast<float *>(take(1));
    return Rounded{rows, inputs, scale, {bytes, byte_lanes, byte_sums}, {nibbles, nibble_lanes, nibble_sums}};
}

// Brings a span's words, and the sums, into the order of `to`. `offset` is that of the weights, four times in a word.
static inline void arrange(const signed char *span, bool nibbles, bool few, int offset, signed char *values, int *lanes, int *sums) {
    int words[SPAN / 4], dots[SPAN / 4];
    memcpy(words, span, SPAN);
    for (long i = 0; i < SPAN / 4; i += WIDTH) store_integers(dots + i, -dot(Integers{}, same(offset), load_integers(words + i)));
    for (long i = 0; nibbles && i < SPAN / 8; i++) dots[i] += dots[SPAN / 8 + i];
    const long in_lanes = nibbles ? SPAN / 8 : SPAN / 4, in_group = in_lanes / 4;
    for (long group = 0; group < 4; group++) {
        sums[group] = 0;
        for (long i = 0; i < in_group; i++) sums[group] += dots[group * in_group + i];
    }
    if (few) {
        memcpy(values, span, SPAN);
        memcpy(lanes, dots, static_cast<unsigned long>(in_lanes) * sizeof(int));
        return;
    }
    for (long step = 0; step < 8; step++)
        for (long group = 0; group < 4; group++) {
            const long word = nibbles ? step % 2 * 16 + group * 4 + step / 2 : group * 8 + step;
            memcpy(values + (step * 4 + group) * 4, words + word, 4);
        }
}

// Rounds row `r`: value / (farthest / 127), to the nearest, ties to even, for weights of 8 bits, of 4, or both.
static void round_row(const Rounded &a, long r, const float *x, bool eight, bool four) {
    Vector farthest{};
    for (long i = 0; i < a.inputs; i += WIDTH) {
        const Vector value = load(x + i), size = value < 0 ? -value : value;
        farthest = size > farthest ? size : farthest;
    }
    const float scale = largest_of(farthest) / 127.0f, by = scale == 0 ? 1.0f : scale;
    a.scale[r] = scale;
    const auto rounded = [&](long i) {
        const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
        return (Integers)(load(x + i) / by + shift) - (Integers)(Vector{} + shift);
    };
    const auto put = [](signed char *to, Integers values) {
        *reinterpret_cast<UnalignedBytes *>(to) = __builtin_convertvector(values, Bytes);
    };
    Integers evens, odds;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) evens[i] = 2 * i, odds[i] = 2 * i + 1;
    const bool few = a.rows <= FEW;
    for (long span = 0; span < a.inputs; span += SPAN) {
        signed char bytes[SPAN], nibbles[SPAN];
        for (long i = 0; i < SPAN; i += 2 * WIDTH) {
            const Integers low = rounded(span + i), high = rounded(span + i + WIDTH);
            put(bytes + i, low), put(bytes + i + WIDTH, high);
            put(nibbles + i / 2, __builtin_shuffle(low, high, evens));
            put(nibbles + (SPAN + i) / 2, __builtin_shuffle(low, high, odds));
        }
        const long at = r * a.inputs + span;
        if (eight)
            arrange(bytes, false, few, 0x80808080, a.bytes.values + at, a.bytes.lanes + at / 4, a.bytes.sums + at / SUM);
        if (four)
            arrange(nibbles, true, few, 0x08080808, a.nibbles.values + at, a.nibbles.lanes + at / 8, a.nibbles.sums + at / SUM);
    }
}

// What becomes of a row's products: scaled by the row, plus the bias, stored or added.
static inline void finish(const Rounded &a, long r, const Map &map, long n, long count, const float *from, float *y, bool add) {
    float *to = y + r * map.y_row + n;
    const float scale = a.scale[r];
    if (count == WIDTH) {
        Vector value = load(from) * scale;
        if (map.bias) value += load(map.bias + n);
        return store(to, add ? load(to) + value : value);
    }
    for (long i = 0; i < count; i++) {
        const float value = from[i] * scale + (map.bias ? map.bias[n + i] : 0);
        to[i] = add ? to[i] + value : value;
    }
}
