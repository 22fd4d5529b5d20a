// Products of activations, rounded to 8-bit integers, and weights stored as integers of 8 or 4 bits.
//
// Included once per instruction set, after vector.inl.
//
// Weights stay as they are stored. To multiply with unsigned bytes, which is what processors do best, each weight is read
// as weight + OFFSET (128, or 8 as 4-bit weights are stored), and OFFSET times the sum of the activations is taken off.
//
// For few rows, outputs are inner products along the stored rows (`inner_products`); for many, the weights of some
// outputs are laid out lane by lane first and used by all rows (`panel_products`).

constexpr long CHUNK = 8 * WIDTH;  // inputs whose 4-bit weights fill a vector
constexpr long SUM = 32;           // inputs of which the activations' sum is kept: the smallest group

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

// Rows of activations as the products below read them.
struct Rounded {
    long rows, inputs;
    signed char *plain;    // [rows, inputs], for 8-bit weights
    signed char *parted;   // [rows, inputs], for 4-bit weights: of each chunk first the even, then the odd inputs
    float *scale;          // [rows]
    int *sum;              // [rows]
    int *lanes;            // [rows, inputs / 8]: minus 8 times the sum of the inputs whose weights share a lane
    int *sums;             // [rows, inputs / SUM]: minus 8 times the sum of these inputs
};

// Rounds row `r`: value / (farthest / 127), to the nearest, ties to even. `plain` and `parted` say which is wanted.
static void round_row(const Rounded &a, long r, const float *x, bool plain, bool parted) {
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
    signed char *to = a.plain + r * a.inputs;
    Integers total{};
    for (long i = 0; plain && i < a.inputs; i += WIDTH) {
        const Integers value = rounded(i);
        total += value;
        *reinterpret_cast<UnalignedBytes *>(to + i) = __builtin_convertvector(value, Bytes);
    }
    a.sum[r] = sum_of(total);
    if (!parted) return;
    Integers evens, odds;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) evens[i] = 2 * i, odds[i] = 2 * i + 1;
    to = a.parted + r * a.inputs;
    int *lanes = a.lanes + r * a.inputs / 8, *sums = a.sums + r * a.inputs / SUM;
    for (long chunk = 0; chunk < a.inputs; chunk += CHUNK) {
        for (long i = 0; i < CHUNK; i += 2 * WIDTH) {
            const Integers low = rounded(chunk + i), high = rounded(chunk + i + WIDTH);
            const Integers even = __builtin_shuffle(low, high, evens), odd = __builtin_shuffle(low, high, odds);
            *reinterpret_cast<UnalignedBytes *>(to + chunk + i / 2) = __builtin_convertvector(even, Bytes);
            *reinterpret_cast<UnalignedBytes *>(to + chunk + (CHUNK + i) / 2) = __builtin_convertvector(odd, Bytes);
        }
        const Integers eights = same(0x08080808);
        Integers lane = dot(Integers{}, eights, load_integers(to + chunk));
        lane = -dot(lane, eights, load_integers(to + chunk + CHUNK / 2));
        store_integers(lanes + chunk / 8, lane);
    }
    for (long g = 0; g < a.inputs / SUM; g++) {
        sums[g] = 0;
        for (long i = 0; i < SUM / 8; i++) sums[g] += lanes[g * SUM / 8 + i];
    }
}

// The scales of the lanes of a chunk: `scales` points to those of its groups.
template <int GROUP, typename Scale>
static inline Vector lane_scales(const Scale *scales) {
    if constexpr (GROUP >= CHUNK) return Vector{} + widen(*scales);
    Vector spread;
#if WIDTH == 16
    constexpr int LANES = GROUP / 8;
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
    for (int i = 0; i < WIDTH; i++) spread[i] = widen(scales[8 * i / GROUP]);
#endif
    return spread;
}

// Products of ROWS rows and OUTPUTS outputs, without the scale of the rows: y[r * y_row + n].
template <int ROWS, int OUTPUTS, typename Scale>
static inline void inner_products_8(const Rounded &a, long r, const Map &map, long n, float *y, long y_row) {
    Integers sums[ROWS][OUTPUTS] = {};
    const signed char *w = static_cast<const signed char *>(map.weights) + n * map.inputs;
    const signed char *x = a.plain + r * a.inputs;
    for (long k = 0; k < map.inputs; k += 4 * WIDTH) {
        Integers weights[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            weights[o] = load_integers(w + o * map.inputs + k) ^ same(0x80808080);
            __builtin_prefetch(w + (o + OUTPUTS) * map.inputs + k);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Integers values = load_integers(x + i * a.inputs + k);
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) sums[i][o] = dot(sums[i][o], weights[o], values);
        }
    }
    const Scale *scales = static_cast<const Scale *>(map.scales) + n;
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++)
            y[i * y_row + o] = static_cast<float>(sum_of(sums[i][o]) - 128 * a.sum[r + i]) * widen(scales[o]);
}

template <int ROWS, int OUTPUTS, int GROUP, typename Scale>
static inline void inner_products_4(const Rounded &a, long r, const Map &map, long n, float *y, long y_row) {
    Vector sums[ROWS][OUTPUTS] = {};
    const unsigned char *w = static_cast<const unsigned char *>(map.weights) + n * map.inputs / 2;
    const Scale *scales = static_cast<const Scale *>(map.scales) + n * map.inputs / GROUP;
    for (long k = 0; k < map.inputs; k += CHUNK) {
        Integers low[OUTPUTS], high[OUTPUTS];
        Vector scale[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            const Integers both = load_integers(w + (o * map.inputs + k) / 2);
            __builtin_prefetch(w + ((o + OUTPUTS) * map.inputs + k) / 2);
            low[o] = both & 0x0f0f0f0f, high[o] = both >> 4 & 0x0f0f0f0f;
            scale[o] = lane_scales<GROUP>(scales + (o * map.inputs + k) / GROUP);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const signed char *x = a.parted + (r + i) * a.inputs + k;
            const Integers even = load_integers(x), odd = load_integers(x + CHUNK / 2);
            const Integers start = load_integers(a.lanes + ((r + i) * a.inputs + k) / 8);
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
        for (int o = 0; o < OUTPUTS; o++) y[i * y_row + o] = sum_of(sums[i][o]);
}

// A panel: some inputs' weights for PANEL outputs, each vector holding four inputs of WIDTH outputs, one byte each. With
// BLOCK inputs it stays in the nearest cache while all rows use it.
constexpr int VECTORS = WIDTH == 16 ? 3 : 2, PANEL = VECTORS * WIDTH;
constexpr long BLOCK = 512;

// A worker's memory for panels.
struct Bench {
    int *weights;   // BLOCK * PANEL bytes
    float *scales;  // of each group in a block, PANEL
    float *sums;    // [rows, PANEL]; integers with 8-bit weights
};

// Lays out inputs [first, first + count) of the outputs from `n` on; past the last, the last is repeated. 4-bit weights
// come word by word, a word's even inputs before its odd ones, so that the words of a group stand together.
static void fill_panel(const Map &map, long n, long first, long count, int *panel) {
    const long in_word = map.kind == INT8 ? 4 : 8, words = map.inputs / in_word, from = first / in_word;
    // What the next call reads: further on in these rows, or the beginning of those that follow.
    const long ahead = first + count < map.inputs ? count / in_word : PANEL * words - from;
    for (long v = 0; v < VECTORS; v++)
        for (long word = 0; word < count / in_word; word += WIDTH) {
            Vector square[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                const long output = n + v * WIDTH + i;
                const int *at = static_cast<const int *>(map.weights) +
                                (output < map.outputs ? output : map.outputs - 1) * words + from + word;
                square[i] = (Vector)load_integers(at);
                __builtin_prefetch(at + ahead);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                const Integers column = (Integers)square[i];
                if (map.kind == INT8) {
                    store_integers(panel + ((word + i) * VECTORS + v) * WIDTH, column ^ same(0x80808080));
                } else {
                    int *to = panel + ((word + i) * 2 * VECTORS + v) * WIDTH;
                    store_integers(to, column & 0x0f0f0f0f);
                    store_integers(to + VECTORS * WIDTH, column >> 4 & 0x0f0f0f0f);
                }
            }
        }
}

// The scales of groups [first, first + count) of the outputs from `n` on.
template <typename Scale>
static void fill_scales(const Map &map, long n, long first, long count, float *scales) {
    const long groups = map.inputs / map.group;
    for (long v = 0; v < VECTORS; v++)
        for (long g = first; g < first + count; g += WIDTH) {
            Vector square[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                const long output = n + v * WIDTH + i;
                const Scale *row = static_cast<const Scale *>(map.scales) + (output < map.outputs ? output : map.outputs - 1) * groups;
                if (g + WIDTH <= groups) {
                    square[i] = load(row + g);
                } else {
                    Scale some[WIDTH] = {};
                    memcpy(some, row + g, static_cast<unsigned long>(groups - g) * sizeof(Scale));
                    square[i] = load(some);
                }
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                if (g + i < first + count) store(scales + (g + i - first) * PANEL + v * WIDTH, square[i]);
        }
}

// Adds the products of ROWS rows and `count` inputs from `first` on to sums[r * PANEL + n].
template <int ROWS>
static inline void panel_products_8(const Rounded &a, long r, long first, long count, const int *panel, int *total) {
    Integers sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[i][v] = load_integers(total + i * PANEL + v * WIDTH);
    const signed char *x = a.plain + r * a.inputs + first;
    for (long k = 0; k < count; k += 4, panel += PANEL) {
        Integers weights[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) weights[v] = load_integers(panel + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            int four;
            memcpy(&four, x + i * a.inputs + k, 4);
            const Integers values = same(four);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = dot(sums[i][v], weights[v], values);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store_integers(total + i * PANEL + v * WIDTH, sums[i][v]);
}

template <int ROWS>
static inline void panel_products_4(const Rounded &a, long r, long group, long first, long count, const int *panel,
                                    const float *scales, float *total) {
    Vector totals[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) totals[i][v] = load(total + i * PANEL + v * WIDTH);
    const signed char *x = a.parted + r * a.inputs;
    const long words = group / 8;
    for (long g = first / group; g < (first + count) / group; g++, scales += PANEL) {
        Integers sums[ROWS][VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            int start = 0;
            for (long part = 0; part < group / SUM; part++) start += a.sums[((r + i) * a.inputs + g * group) / SUM + part];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = same(start);
        }
        for (long word = g * words; word < (g + 1) * words; word++)
            for (int odd = 0; odd < 2; odd++, panel += PANEL) {
                        const signed char *at = x + word / WIDTH * CHUNK + odd * (CHUNK / 2) + word % WIDTH * 4;
                Integers weights[VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) weights[v] = load_integers(panel + v * WIDTH);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    int four;
                    memcpy(&four, at + i * a.inputs, 4);
                    const Integers values = same(four);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) sums[i][v] = dot(sums[i][v], weights[v], values);
                }
            }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                totals[i][v] += __builtin_convertvector(sums[i][v], Vector) * load(scales + v * WIDTH);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) store(total + i * PANEL + v * WIDTH, totals[i][v]);
}

// What becomes of a row's products: scaled by the row, plus the bias, stored or added.
static inline void finish(const Rounded &a, long r, const Map &map, long n, long count, const float *from, float *y, bool add) {
    float *to = y + r * map.y_row + n;
    for (long i = 0; i < count; i++) {
        const float value = from[i] * a.scale[r] + (map.bias ? map.bias[n + i] : 0);
        to[i] = add ? to[i] + value : value;
    }
}

constexpr long FEW = 4;  // rows for which laying out panels does not pay

template <int ROWS, int OUTPUTS, typename Scale>
static inline void inner_tile(const Rounded &a, long r, const Map &map, long n, float *y, bool add) {
    float tile[ROWS][OUTPUTS];
    if (map.kind == INT8)
        inner_products_8<ROWS, OUTPUTS, Scale>(a, r, map, n, tile[0], OUTPUTS);
    else if (map.group == 32)
        inner_products_4<ROWS, OUTPUTS, 32, Scale>(a, r, map, n, tile[0], OUTPUTS);
    else if (map.group == 64)
        inner_products_4<ROWS, OUTPUTS, 64, Scale>(a, r, map, n, tile[0], OUTPUTS);
    else
        inner_products_4<ROWS, OUTPUTS, 128, Scale>(a, r, map, n, tile[0], OUTPUTS);
    for (int i = 0; i < ROWS; i++) finish(a, r + i, map, n, OUTPUTS, tile[i], y, add);
}

template <int OUTPUTS, typename Scale>
static void inner_rows(const Rounded &a, const Map &map, long n, float *y, bool add) {
    switch (a.rows) {
    case 1: return inner_tile<1, OUTPUTS, Scale>(a, 0, map, n, y, add);
    case 2: return inner_tile<2, OUTPUTS, Scale>(a, 0, map, n, y, add);
    case 3: return inner_tile<3, OUTPUTS, Scale>(a, 0, map, n, y, add);
    case 4: return inner_tile<4, OUTPUTS, Scale>(a, 0, map, n, y, add);
    }
}

template <int ROWS>
static inline void panel_rows(const Rounded &a, long r, const Map &map, long first, long count, const Bench &bench) {
    float *sums = bench.sums + r * PANEL;
    if (map.kind == INT8)
        panel_products_8<ROWS>(a, r, first, count, bench.weights, reinterpret_cast<int *>(sums));
    else
        panel_products_4<ROWS>(a, r, map.group, first, count, bench.weights, bench.scales, sums);
}

// Outputs [first, last) for all rows.
template <typename Scale>
static void multiply_integers(const Rounded &a, const Map &map, long first, long last, float *y, bool add, const Bench &bench) {
    if (a.rows <= FEW) {
        long n = first;
        for (; n + 4 <= last; n += 4) inner_rows<4, Scale>(a, map, n, y, add);
        for (; n < last; n++) inner_rows<1, Scale>(a, map, n, y, add);
        return;
    }
    constexpr int MOST = WIDTH == 16 ? 8 : 4;
    for (long n = first; n < last; n += PANEL) {
        for (long i = 0; i < a.rows * PANEL; i += WIDTH) store(bench.sums + i, Vector{});  // zero as an integer, too
        for (long k = 0; k < map.inputs; k += BLOCK) {
            const long count = k + BLOCK < map.inputs ? BLOCK : map.inputs - k;
            fill_panel(map, n, k, count, bench.weights);
            if (map.kind == INT4) fill_scales<Scale>(map, n, k / map.group, count / map.group, bench.scales);
            long r = 0;
            if (map.kind == INT8)
                for (; r + MOST <= a.rows; r += MOST) panel_rows<MOST>(a, r, map, k, count, bench);
            for (; r + 4 <= a.rows; r += 4) panel_rows<4>(a, r, map, k, count, bench);
            for (; r < a.rows; r++) panel_rows<1>(a, r, map, k, count, bench);
        }
        const long count = map.outputs - n < PANEL ? map.outputs - n : PANEL;
        if (map.kind == INT8) fill_scales<Scale>(map, n, 0, 1, bench.scales);
        for (long r = 0; r < a.rows; r++) {
            float *sums = bench.sums + r * PANEL;
            for (long i = 0; map.kind == INT8 && i < PANEL; i += WIDTH) {
                const Integers sum = load_integers(sums + i) - 128 * a.sum[r];
                store(sums + i, __builtin_convertvector(sum, Vector) * load(bench.scales + i));
            }
            finish(a, r, map, n, count, sums, y, add);
        }
    }
}
