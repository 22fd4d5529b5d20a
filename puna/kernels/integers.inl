// Products of activations, rounded to 8-bit integers, and weights stored as integers of 8 or 4 bits.
//
// Included once per instruction set, after vector.inl.
//
// Weights stay as they are stored. To multiply with unsigned bytes, which is what processors do best, each weight is read
// as weight + OFFSET (128, or 8 as 4-bit weights are stored), and OFFSET times the sum of the activations is taken off.
//
// For few rows, outputs are inner products along the stored rows (`inner_products`); for many, the weights of some
// outputs are laid out lane by lane first and used by all rows (`panel_products`).

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

// The scales of a vector of stored weights, whose LANES lanes each belong to a group: `scales` points to the first.
template <int LANES, typename Scale>
static inline Vector lane_scales(const Scale *scales) {
    if constexpr (LANES >= WIDTH) return Vector{} + widen(*scales);
    Vector spread;
#if WIDTH == 16
    if constexpr (sizeof(Scale) == 2) {
        __m512i order;
        for (int i = 0; i < 32; i++) reinterpret_cast<short *>(&order)[i] = static_cast<short>(i / 2 / LANES);
        const __m128i some = LANES == 4 ? _mm_loadl_epi64(reinterpret_cast<const __m128i *>(scales)) : _mm_loadu_si32(scales);
        spread = (Vector)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi128_si512(some));
    } else {
        Integers order;
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) order[i] = i / LANES;
        const __m128i some = LANES == 4 ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(scales))
                                        : _mm_loadl_epi64(reinterpret_cast<const __m128i *>(scales));
        spread = (Vector)_mm512_permutexvar_epi32((__m512i)order, _mm512_castsi128_si512(some));
    }
#else
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) spread[i] = widen(scales[i / LANES]);
#endif
    return spread;
}

// Products of ROWS rows and OUTPUTS outputs, without the scale of the rows: y[r][n]. GROUP is 0 for one scale an output.
// `next` is the output whose turn comes afterwards.
template <int ROWS, int OUTPUTS, int GROUP, typename Scale>
static inline void inner_products_8(const Rounded &a, const Map &map, long n, long next, float (&y)[ROWS][OUTPUTS]) {
    Integers sums[ROWS][OUTPUTS] = {};
    Vector totals[ROWS][OUTPUTS] = {};
    const signed char *w = static_cast<const signed char *>(map.weights) + n * map.inputs;
    const Scale *scales = static_cast<const Scale *>(map.scales) + n * (map.inputs / map.group);
    const long ahead = (next - n) * map.inputs;
    for (long k = 0; k < map.inputs; k += 4 * WIDTH) {
        Integers weights[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            weights[o] = load_integers(w + o * map.inputs + k) ^ same(0x80808080);
            __builtin_prefetch(w + o * map.inputs + k + ahead);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Integers values = load_integers(a.bytes.values + i * a.inputs + k);
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) {
                if constexpr (GROUP > 0) {
                    const Integers sum = dot(load_integers(a.bytes.lanes + (i * a.inputs + k) / 4), weights[o], values);
                    const Vector scale = lane_scales<GROUP / 4>(scales + (o * map.inputs + k) / GROUP);
                    totals[i][o] += __builtin_convertvector(sum, Vector) * scale;
                } else {
                    sums[i][o] = dot(sums[i][o], weights[o], values);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        int offset = 0;
        for (long g = 0; GROUP == 0 && g < a.inputs / SUM; g++) offset += a.bytes.sums[i * a.inputs / SUM + g];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++)
            y[i][o] = GROUP > 0 ? sum_of(totals[i][o]) : static_cast<float>(sum_of(sums[i][o]) + offset) * widen(scales[o]);
    }
}

template <int ROWS, int OUTPUTS, int GROUP, typename Scale>
static inline void inner_products_4(const Rounded &a, const Map &map, long n, long next, float (&y)[ROWS][OUTPUTS]) {
    Vector sums[ROWS][OUTPUTS] = {};
    const unsigned char *w = static_cast<const unsigned char *>(map.weights) + n * map.inputs / 2;
    const Scale *scales = static_cast<const Scale *>(map.scales) + n * map.inputs / GROUP;
    const long ahead = (next - n) * map.inputs / 2;
    for (long k = 0; k < map.inputs; k += 8 * WIDTH) {
        Integers low[OUTPUTS], high[OUTPUTS];
        Vector scale[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            const Integers both = load_integers(w + (o * map.inputs + k) / 2);
            __builtin_prefetch(w + (o * map.inputs + k) / 2 + ahead);
            low[o] = both & 0x0f0f0f0f, high[o] = both >> 4 & 0x0f0f0f0f;
            scale[o] = lane_scales<GROUP / 8>(scales + (o * map.inputs + k) / GROUP);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const signed char *x = a.nibbles.values + i * a.inputs + k / SPAN * SPAN + k % SPAN / 2;
            const Integers even = load_integers(x), odd = load_integers(x + SPAN / 2);
            const Integers start = load_integers(a.nibbles.lanes + (i * a.inputs + k) / 8);
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) {
                const Integers sum = dot(dot(start, low[o], even), high[o], odd);
                sums[i][o] += __builtin_convertvector(sum, Vector) * scale[o];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) y[i][o] = sum_of(sums[i][o]);
}

// A panel: the weights of PANEL outputs for BLOCK inputs, one byte each, so that it stays in the nearest cache while all
// rows use it. A vector holds four inputs (a word) of WIDTH / 4 outputs in each of the four groups of a span: lane
// 4 * output + group. Eight steps of VECTORS vectors make up a span, so a lane never adds up more than a group.
constexpr int VECTORS = 4, PANEL = WIDTH, PARTS = WIDTH / 4;
constexpr long BLOCK = 1024;
constexpr int MOST = WIDTH == 16 ? 4 : 2;  // rows at once, so that the processor's registers hold their sums

// A worker's memory for panels.
struct Bench {
    int *weights;   // BLOCK * PANEL bytes
    float *scales;  // of each span in a block, VECTORS vectors
    float *sums;    // [rows, VECTORS * WIDTH]; integers where an output has one scale
};

constexpr long BENCH = BLOCK * PANEL / 4 + BLOCK / SPAN * VECTORS * WIDTH;  // floats, and more for each row:
constexpr long BENCH_ROW = VECTORS * WIDTH;

static inline Bench bench_in(float *memory) {
    float *scales = memory + BLOCK * PANEL / 4;
    return Bench{reinterpret_cast<int *>(memory), scales, scales + BLOCK / SPAN * VECTORS * WIDTH};
}

// Separates element i, i + COUNT, i + 2 * COUNT ... of all vectors for each i < COUNT.
template <int COUNT, typename V>
static inline void deal(V (&all)[COUNT]) {
    if constexpr (COUNT > 1) {
        Integers evens, odds;
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) evens[i] = 2 * i, odds[i] = 2 * i + 1;
        V even[COUNT / 2], odd[COUNT / 2];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT / 2; i++) {
            even[i] = __builtin_shuffle(all[2 * i], all[2 * i + 1], evens);
            odd[i] = __builtin_shuffle(all[2 * i], all[2 * i + 1], odds);
        }
        deal(even);
        deal(odd);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT / 2; i++) all[2 * i] = even[i], all[2 * i + 1] = odd[i];
    }
}

// Lays out inputs [first, first + count) of the outputs from `n` on; past the last, the last is repeated.
template <bool NIBBLES>
static void fill_panel(const Map &map, long n, long first, long count, int *panel) {
    constexpr int LOADS = NIBBLES ? 4 : 8, WORDS = NIBBLES ? 16 : 32;  // of PARTS outputs and of one, in a span
    const long row = map.inputs / SPAN * WORDS;
    const int *rows[VECTORS * PARTS];
    for (long i = 0; i < VECTORS * PARTS; i++)
        rows[i] = static_cast<const int *>(map.weights) + (n + i < map.outputs ? n + i : map.outputs - 1) * row + first / SPAN * WORDS;
    for (long span = 0; span < count / SPAN; span++, panel += 8 * VECTORS * WIDTH)
        for (long v = 0; v < VECTORS; v++) {
            Integers words[LOADS];
#pragma GCC unroll 8
            for (int i = 0; i < LOADS; i++)
                words[i] = load_integers(rows[v * PARTS + i * WIDTH / WORDS] + span * WORDS + i * WIDTH % WORDS);
            deal(words);
            int *to = panel + v * WIDTH;
#pragma GCC unroll 8
            for (int i = 0; i < LOADS; i++) {
                if constexpr (NIBBLES) {
                    store_integers(to + 2 * i * VECTORS * WIDTH, words[i] & 0x0f0f0f0f);
                    store_integers(to + (2 * i + 1) * VECTORS * WIDTH, words[i] >> 4 & 0x0f0f0f0f);
                } else {
                    store_integers(to + i * VECTORS * WIDTH, words[i] ^ same(0x80808080));
                }
            }
        }
}

// The scales of the spans [first, first + count) of the outputs from `n` on.
template <typename Scale>
static void fill_scales(const Map &map, long n, long first, long count, float *scales) {
    const long groups = map.inputs / map.group, in_span = SPAN / map.group;
    const Scale *end = static_cast<const Scale *>(map.scales) + map.outputs * groups;
    Integers order;
    for (int i = 0; i < WIDTH; i++) order[i] = static_cast<int>(i * SUM / map.group);
    for (long v = 0; v < VECTORS; v++)
        for (long span = 0; span < count; span += PARTS) {
            Vector square[PARTS];
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++) {
                const long output = n + v * PARTS + i;
                const Scale *at = end + ((output < map.outputs ? output : map.outputs - 1) - map.outputs) * groups + (first + span) * in_span;
                Scale some[WIDTH] = {};
                if (at + WIDTH > end) memcpy(some, at, static_cast<unsigned long>(end - at) * sizeof(Scale)), at = some;
                square[i] = map.group == SUM ? load(at) : __builtin_shuffle(load(at), order);
            }
            transpose<4>(square);
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++)
                if (span + i < count) store(scales + ((span + i) * VECTORS + v) * WIDTH, square[i]);
        }
}

// A block of weights and scales that will be read soon, asked for row by row while something else is computed.
struct Ahead {
    const char *weights, *scales;
    long weights_row, scales_row, size, rows;  // bytes, and `size` of them wanted of the weights
    void ask() {
        if (rows-- <= 0) return;
        for (long line = 0; line < size; line += 64) __builtin_prefetch(weights + line, 0, 2);
        __builtin_prefetch(scales, 0, 2);
        weights += weights_row, scales += scales_row;
    }
};

// That of PANEL outputs from `n` on, and `count` inputs from `first` on.
static inline Ahead ahead_of(const Map &map, long n, long first, long count) {
    const long bits = map.kind == INT4 ? 4 : 8, scale = map.wide_scales ? 4 : 2;
    const long row = map.inputs * bits / 8, scales_row = map.inputs / map.group * scale;
    return Ahead{static_cast<const char *>(map.weights) + n * row + first * bits / 8,
                 static_cast<const char *>(map.scales) + n * scales_row + first / map.group * scale, row, scales_row,
                 count * bits / 8, PANEL};
}

// Adds the products of ROWS rows from `r` on and `count` inputs from `first` on to the totals.
template <int ROWS, bool GROUPED>
static inline void panel_products(const Ordered &a, long inputs, long r, long first, long count, const Bench &bench, Ahead &ahead) {
    const int *panel = bench.weights;
    const float *scales = bench.scales;
    float *total = bench.sums + r * BENCH_ROW;
    for (long span = first; span < first + count; span += SPAN, scales += VECTORS * WIDTH) {
        ahead.ask();
        Integers sums[ROWS][VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                sums[i][v] = GROUPED ? repeated(a.sums + ((r + i) * inputs + span) / SUM) : load_integers(total + i * BENCH_ROW + v * WIDTH);
        for (long step = 0; step < 8; step++, panel += VECTORS * WIDTH) {
            Integers weights[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) weights[v] = load_integers(panel + v * WIDTH);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                const Integers values = repeated(a.values + (r + i) * inputs + span + step * 16);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sums[i][v] = dot(sums[i][v], weights[v], values);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                float *to = total + i * BENCH_ROW + v * WIDTH;
                if constexpr (GROUPED)
                    store(to, load(to) + __builtin_convertvector(sums[i][v], Vector) * load(scales + v * WIDTH));
                else
                    store_integers(to, sums[i][v]);
            }
    }
}

// All rows, MOST at once.
template <int ROWS, bool GROUPED>
static inline void panel_rows(const Ordered &a, long rows, long inputs, long r, long first, long count, const Bench &bench, Ahead &ahead) {
    for (; r + ROWS <= rows; r += ROWS) panel_products<ROWS, GROUPED>(a, inputs, r, first, count, bench, ahead);
    if constexpr (ROWS > 1)
        if (r < rows) panel_rows<ROWS - 1, GROUPED>(a, rows, inputs, r, first, count, bench, ahead);
}

// What becomes of a row's products: scaled by the row, plus the bias, stored or added.
static inline void finish(const Rounded &a, long r, const Map &map, long n, long count, const float *from, float *y, bool add) {
    float *to = y + r * map.y_row + n;
    const float scale = a.scale[r];
    if (count == PANEL) {
        Vector value = load(from) * scale;
        if (map.bias) value += load(map.bias + n);
        return store(to, add ? load(to) + value : value);
    }
    for (long i = 0; i < count; i++) {
        const float value = from[i] * scale + (map.bias ? map.bias[n + i] : 0);
        to[i] = add ? to[i] + value : value;
    }
}

// Outputs [first, last) for all rows; after them come those from `next` on.
template <bool NIBBLES, bool GROUPED, typename Scale>
static void multiply_panels(const Rounded &a, const Map &map, long first, long last, long next, float *y, bool add, const Bench &bench) {
    const Ordered &ordered = NIBBLES ? a.nibbles : a.bytes;
    for (long n = first; n < last; n += PANEL) {
        for (long i = 0; i < a.rows * BENCH_ROW; i += WIDTH) store(bench.sums + i, Vector{});  // zero as an integer, too
        for (long k = 0; k < map.inputs; k += BLOCK) {
            const long count = k + BLOCK < map.inputs ? BLOCK : map.inputs - k;
            fill_panel<NIBBLES>(map, n, k, count, bench.weights);
            if (GROUPED) fill_scales<Scale>(map, n, k / SPAN, count / SPAN, bench.scales);
            const bool more = k + count < map.inputs;
            Ahead ahead = ahead_of(map, more ? n : n + PANEL < last ? n + PANEL : next, more ? k + count : 0, BLOCK);
            panel_rows<MOST, GROUPED>(ordered, a.rows, a.inputs, 0, k, count, bench, ahead);
        }
        const long count = map.outputs - n < PANEL ? map.outputs - n : PANEL;
        for (long r = 0; r < a.rows; r++) {
            const float *sums = bench.sums + r * BENCH_ROW;
            float products[PANEL];
            if constexpr (GROUPED) {
                Vector four[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) four[v] = load(sums + v * WIDTH);
                deal(four);
                store(products, four[0] + four[1] + (four[2] + four[3]));
            } else {
                Integers four[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) four[v] = load_integers(sums + v * WIDTH);
                deal(four);
                int offset = 0;
                for (long g = 0; g < a.inputs / SUM; g++) offset += ordered.sums[r * a.inputs / SUM + g];
                store(products, __builtin_convertvector(four[0] + four[1] + four[2] + four[3] + offset, Vector));
                for (long i = 0; i < count; i++) products[i] *= widen(static_cast<const Scale *>(map.scales)[n + i]);
            }
            finish(a, r, map, n, count, products, y, add);
        }
    }
}

template <int ROWS, int OUTPUTS, typename Scale>
static inline void inner_tile(const Rounded &a, const Map &map, long n, long next, float *y, bool add) {
    float tile[ROWS][OUTPUTS];
    if (map.kind == INT8 && map.group == 32)
        inner_products_8<ROWS, OUTPUTS, 32, Scale>(a, map, n, next, tile);
    else if (map.kind == INT8)
        inner_products_8<ROWS, OUTPUTS, 0, Scale>(a, map, n, next, tile);
    else if (map.group == 32)
        inner_products_4<ROWS, OUTPUTS, 32, Scale>(a, map, n, next, tile);
    else if (map.group == 64)
        inner_products_4<ROWS, OUTPUTS, 64, Scale>(a, map, n, next, tile);
    else
        inner_products_4<ROWS, OUTPUTS, 128, Scale>(a, map, n, next, tile);
    for (int i = 0; i < ROWS; i++) finish(a, i, map, n, OUTPUTS, tile[i], y, add);
}

template <int OUTPUTS, typename Scale>
static inline void inner_rows(const Rounded &a, const Map &map, long n, long next, float *y, bool add) {
    static_assert(FEW == 4);
    switch (a.rows) {
    case 1: return inner_tile<1, OUTPUTS, Scale>(a, map, n, next, y, add);
    case 2: return inner_tile<2, OUTPUTS, Scale>(a, map, n, next, y, add);
    case 3: return inner_tile<3, OUTPUTS, Scale>(a, map, n, next, y, add);
    case 4: return inner_tile<4, OUTPUTS, Scale>(a, map, n, next, y, add);
    }
}

// Outputs [first, last) for all rows; after them come those from `next` on.
template <typename Scale>
static void multiply_integers(const Rounded &a, const Map &map, long first, long last, long next, float *y, bool add, const Bench &bench) {
    if (a.rows <= FEW) {
        long n = first;
        for (; n + 4 <= last; n += 4) inner_rows<4, Scale>(a, map, n, n + 4 < last ? n + 4 : next, y, add);
        for (; n < last; n++) inner_rows<1, Scale>(a, map, n, n + 1 < last ? n + 1 : next, y, add);
    } else if (map.kind == INT4) {
        multiply_panels<true, true, Scale>(a, map, first, last, next, y, add, bench);
    } else if (map.group == 32) {
        multiply_panels<false, true, Scale>(a, map, first, last, next, y, add, bench);
    } else {
        multiply_panels<false, false, Scale>(a, map, first, last, next, y, add, bench);
    }
}
