// Products of activations and weights stored as float32 or bfloat16, for few rows.
//
// Included once per instruction set, after vector.inl.

template <int ROWS, int OUTPUTS, typename Weight>
static inline void float_tile(const float *x, const Map &map, long r, long n, float *y, bool add) {
    Vector sums[ROWS][OUTPUTS] = {};
    const Weight *w = static_cast<const Weight *>(map.weights) + n * map.inputs;
    for (long k = 0; k < map.inputs; k += WIDTH) {
        Vector weights[OUTPUTS];
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) weights[o] = load(w + o * map.inputs + k);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Vector values = load(x + (r + i) * map.inputs + k);
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) sums[i][o] += values * weights[o];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int o = 0; o < OUTPUTS; o++) {
            const float value = sum_of(sums[i][o]) + (map.bias ? map.bias[n + o] : 0);
            float *to = y + (r + i) * map.y_row + n + o;
            *to = add ? *to + value : value;
        }
}

template <int OUTPUTS, typename Weight>
static void float_rows(const float *x, long rows, const Map &map, long n, float *y, bool add) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) float_tile<4, OUTPUTS, Weight>(x, map, r, n, y, add);
    for (; r < rows; r++) float_tile<1, OUTPUTS, Weight>(x, map, r, n, y, add);
}

// Outputs [first, last) for rows of x, [rows, inputs]; inputs are a multiple of WIDTH.
template <typename Weight>
static void multiply_floats(const float *x, long rows, const Map &map, long first, long last, float *y, bool add) {
    long n = first;
    for (; n + 4 <= last; n += 4) float_rows<4, Weight>(x, rows, map, n, y, add);
    for (; n < last; n++) float_rows<1, Weight>(x, rows, map, n, y, add);
}
