// Products of few rows: each output is an inner product along its weights as they are stored, read once for all rows.
//
// Included once per instruction set, after integers.inl.

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

// The weights of some outputs are read as STREAMS streams side by side, each of a part of the outputs. Processors see for
// themselves how such streams go on, but not beyond a page: so each is asked for DISTANCE bytes before its turn, and at its
// end the beginning of what comes afterwards. Rows beside each other in one page are read some 15 % slower.
constexpr long STREAMS = 4, DISTANCE = 2048;

struct Streams {
    long apart;       // outputs from stream to stream
    long left, jump;  // bytes to the ends of the streams, and from there to where they go on
    long ahead(long done) const { return done + DISTANCE < left ? DISTANCE : DISTANCE + jump; }
};

// Asks for the scales that a row of weights will need, in each stream: `ahead` scales further.
template <int OUTPUTS, typename Scale>
static inline void ask_scales(const Scale *scales, long apart, long groups, long ahead) {
    for (int o = 0; o < OUTPUTS; o++)
        for (long g = 0; g < groups; g += 64 / static_cast<long>(sizeof(Scale))) __builtin_prefetch(scales + o * apart * groups + g + ahead);
}

// Products of ROWS rows and of output `n` in each of OUTPUTS streams, without the scale of the rows: y[r][stream]. GROUP
// is 0 for one scale an output.
template <int ROWS, int OUTPUTS, int GROUP, typename Scale>
static inline void inner_products_8(const Rounded &a, const Map &map, long n, const Streams &streams, float (&y)[ROWS][OUTPUTS]) {
    Integers sums[ROWS][OUTPUTS] = {};
    Vector totals[ROWS][OUTPUTS] = {};
    const signed char *w = static_cast<const signed char *>(map.weights) + n * map.inputs;
    const long groups = map.inputs / map.group;
    const Scale *scales = static_cast<const Scale *>(map.scales) + n * groups;
    if constexpr (GROUP > 0) ask_scales<OUTPUTS>(scales, streams.apart, groups, streams.ahead(0) / GROUP);
    for (long k = 0; k < map.inputs; k += 4 * WIDTH) {
        Integers weights[OUTPUTS];
        const long ahead = streams.ahead(k);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            const signed char *at = w + o * streams.apart * map.inputs + k;
            weights[o] = load_integers(at) ^ same(0x80808080);
            __builtin_prefetch(at + ahead);
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Integers values = load_integers(a.bytes.values + i * a.inputs + k);
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) {
                if constexpr (GROUP > 0) {
                    const Integers sum = dot(load_integers(a.bytes.lanes + (i * a.inputs + k) / 4), weights[o], values);
                    const Vector scale = lane_scales<GROUP / 4>(scales + o * streams.apart * groups + k / GROUP);
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
            y[i][o] = GROUP > 0 ? sum_of(totals[i][o]) : static_cast<float>(sum_of(sums[i][o]) + offset) * widen(scales[o * streams.apart]);
    }
}

template <int ROWS, int OUTPUTS, int GROUP, typename Scale>
static inline void inner_products_4(const Rounded &a, const Map &map, long n, const Streams &streams, float (&y)[ROWS][OUTPUTS]) {
    Vector sums[ROWS][OUTPUTS] = {};
    const unsigned char *w = static_cast<const unsigned char *>(map.weights) + n * map.inputs / 2;
    const long groups = map.inputs / GROUP;
    const Scale *scales = static_cast<const Scale *>(map.scales) + n * groups;
    ask_scales<OUTPUTS>(scales, streams.apart, groups, streams.ahead(0) / (GROUP / 2));
    for (long k = 0; k < map.inputs; k += 8 * WIDTH) {
        Integers low[OUTPUTS], high[OUTPUTS];
        Vector scale[OUTPUTS];
        const long ahead = streams.ahead(k / 2);
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            const unsigned char *at = w + (o * streams.apart * map.inputs + k) / 2;
            const Integers both = load_integers(at);
            __builtin_prefetch(at + ahead);
            low[o] = both & 0x0f0f0f0f, high[o] = both >> 4 & 0x0f0f0f0f;
            scale[o] = lane_scales<GROUP / 8>(scales + o * streams.apart * groups + k / GROUP);
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

template <int ROWS, int OUTPUTS, typename Scale>
static inline void inner_tile(const Rounded &a, const Map &map, long n, const Streams &streams, float *y, bool add) {
    float tile[ROWS][OUTPUTS];
    if (map.kind == INT8 && map.group == 32)
        inner_products_8<ROWS, OUTPUTS, 32, Scale>(a, map, n, streams, tile);
    else if (map.kind == INT8)
        inner_products_8<ROWS, OUTPUTS, 0, Scale>(a, map, n, streams, tile);
    else if (map.group == 32)
        inner_products_4<ROWS, OUTPUTS, 32, Scale>(a, map, n, streams, tile);
    else if (map.group == 64)
        inner_products_4<ROWS, OUTPUTS, 64, Scale>(a, map, n, streams, tile);
    else
        inner_products_4<ROWS, OUTPUTS, 128, Scale>(a, map, n, streams, tile);
    for (int i = 0; i < ROWS; i++)
        for (int o = 0; o < OUTPUTS; o++) finish(a, i, map, n + o * streams.apart, 1, tile[i] + o, y, add);
}

template <int OUTPUTS, typename Scale>
static inline void inner_rows(const Rounded &a, const Map &map, long n, const Streams &streams, float *y, bool add) {
    static_assert(FEW == 4);
    switch (a.rows) {
    case 1: return inner_tile<1, OUTPUTS, Scale>(a, map, n, streams, y, add);
    case 2: return inner_tile<2, OUTPUTS, Scale>(a, map, n, streams, y, add);
    case 3: return inner_tile<3, OUTPUTS, Scale>(a, map, n, streams, y, add);
    case 4: return inner_tile<4, OUTPUTS, Scale>(a, map, n, streams, y, add);
    }
}

// Outputs [first, last) for all rows; after them come those from `next` on.
template <typename Scale>
static void multiply_inner(const Rounded &a, const Map &map, long first, long last, long next, float *y, bool add) {
    const long apart = (last - first) / STREAMS, row = map.inputs * (map.kind == INT4 ? 4 : 8) / 8;
    Streams streams{apart, apart * row, (next - first - apart) * row};
    for (long i = 0; i < apart; i++, streams.left -= row) inner_rows<STREAMS, Scale>(a, map, first + i, streams, y, add);
    for (long n = first + apart * STREAMS; n < last; n++) inner_rows<1, Scale>(a, map, n, streams, y, add);
}
