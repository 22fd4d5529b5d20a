// Products of many rows: the weights of some outputs are laid out lane by lane in the nearest cache, and used by all rows.
//
// Included once per instruction set, after integers.inl and inner.inl.

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

// Outputs [first, last) for all rows; after them come those from `next` on.
template <typename Scale>
static void multiply_integers(const Rounded &a, const Map &map, long first, long last, long next, float *y, bool add, const Bench &bench) {
    if (a.rows <= FEW) {
        multiply_inner<Scale>(a, map, first, last, next, y, add);
    } else if (map.kind == INT4) {
        multiply_panels<true, true, Scale>(a, map, first, last, next, y, add, bench);
    } else if (map.group == 32) {
        multiply_panels<false, true, Scale>(a, map, first, last, next, y, add, bench);
    } else {
        multiply_panels<false, false, Scale>(a, map, first, last, next, y, add, bench);
    }
}
