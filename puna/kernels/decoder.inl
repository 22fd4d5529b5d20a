// A forward of a whole model over new tokens of several sequences, with keys and values in blocks.
//
// Included once per instruction set, after the other kernels. The steps are those of puna/model/transformer.py, which
// is the twin that says what is right. Activations between maps are float32.

constexpr long PIECE = 64;  // outputs

// What a thread needs to know about itself.
struct Worker {
    long number, count;
    Bench bench;
};

// This worker's share of `count`, in multiples of `unit`.
static inline void share(const Worker &w, long count, long unit, long &first, long &last) {
    const long units = (count + unit - 1) / unit;
    first = units * w.number / w.count * unit;
    last = units * (w.number + 1) / w.count * unit;
    if (last > count) last = count;
}

// Activations on their way into maps, as floats and, where a map wants that, rounded.
struct Inputs {
    float *x;  // [rows, inputs]
    Rounded rounded;
};

// Outputs are dealt out in pieces, as one processor may be slower than another. A worker takes its next piece before it
// works on the one that it has, and so knows what to ask memory for. `taken` counts pieces and begins at zero.
template <typename Work>
static inline void each_piece(long count, long *taken, Work work) {
    const long pieces = (count + PIECE - 1) / PIECE;
    const auto take = [&] { return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED); };
    for (long piece = take(); piece < pieces;) {
        const long next = take(), last = (piece + 1) * PIECE;
        work(piece * PIECE, last < count ? last : count, next < pieces ? next * PIECE : piece * PIECE);
        piece = next;
    }
}

// Outputs [first, last); after them come those from `next` on.
static void multiply(const Worker &w, const Inputs &a, const Map &map, long first, long last, long next, float *y, bool add) {
    if (map.kind == FLOAT32) return multiply_floats<float>(a.x, a.rounded.rows, map, first, last, y, add);
    if (map.kind == BFLOAT16) return multiply_floats<unsigned short>(a.x, a.rounded.rows, map, first, last, y, add);
    if (map.wide_scales)
        multiply_integers<float>(a.rounded, map, first, last, next, y, add, w.bench);
    else
        multiply_integers<unsigned short>(a.rounded, map, first, last, next, y, add, w.bench);
}

static void multiply(const Worker &w, const Inputs &a, const Map &map, long *taken, float *y, bool add) {
    each_piece(map.outputs, taken, [&](long first, long last, long next) { multiply(w, a, map, first, last, next, y, add); });
}

// Rounds this worker's rows as `maps` want it.
static void round_rows(const Worker &w, const Inputs &a, const Map *const *maps, int count) {
    bool plain = false, parted = false;
    for (int i = 0; i < count; i++) plain |= maps[i]->kind == INT8, parted |= maps[i]->kind == INT4;
    if (!plain && !parted) return;
    long first, last;
    share(w, a.rounded.rows, 1, first, last);
    for (long r = first; r < last; r++) round_row(a.rounded, r, a.x + r * a.rounded.inputs, plain, parted);
}

static inline void normalize(const float *x, const float *weight, long size, float eps, float *y) {
    Vector squares{};
    for (long i = 0; i < size; i += WIDTH) squares += load(x + i) * load(x + i);
    const float by = 1.0f / sqrtf(sum_of(squares) / static_cast<float>(size) + eps);
    for (long i = 0; i < size; i += WIDTH) store(y + i, load(x + i) * by * load(weight + i));
}

static void normalize_rows(const Worker &w, const float *x, const float *weight, long rows, long size, float eps, float *y) {
    long first, last;
    share(w, rows, 1, first, last);
    for (long r = first; r < last; r++) normalize(x + r * size, weight, size, eps, y + r * size);
}

// Turns the pairs (i, i + size / 2) of a head, after normalising it where the model does; size is a multiple of 32.
static inline void turn(float *head, const float *norm, float eps, const float *cosines, const float *sines, long size) {
    if (norm) normalize(head, norm, size, eps, head);
    for (long i = 0; i < size / 2; i += WIDTH) {
        const Vector a = load(head + i), b = load(head + i + size / 2), cosine = load(cosines + i), sine = load(sines + i);
        store(head + i, a * cosine - b * sine);
        store(head + i + size / 2, b * cosine + a * sine);
    }
}

static inline Vector silu(Vector x) { return x * logistic(x); }

// Where a slot's keys or values of a group are.
template <typename Stored>
static inline Stored *slot_of(void *pool, const Forward &f, const long *table, long position, long group) {
    const long slot = table[position / f.block_size] * f.block_size + position % f.block_size;
    return static_cast<Stored *>(pool) + (slot * f.groups + group) * f.head_size;
}

// Asks for what will be read soon: slots lie too far apart for the processor to see a pattern.
template <typename Stored>
static inline void prefetch(const Stored *at, long size) {
    for (long i = 0; i < size; i += 64 / sizeof(Stored)) __builtin_prefetch(at + i);
}

constexpr long AHEAD = 6;  // slots

// Calls visit(position, keys or values) for positions [0, seen).
template <typename Stored, typename Visit>
static inline void each_slot(void *pool, const Forward &f, const long *table, long group, long seen, Visit visit) {
    const long row = f.groups * f.head_size;
    for (long first = 0; first < seen; first += f.block_size) {
        const Stored *at = slot_of<Stored>(pool, f, table, first, group);
        const long last = first + f.block_size < seen ? first + f.block_size : seen;
        if (last < seen) {
            const Stored *next = slot_of<Stored>(pool, f, table, last, group);
            for (long i = 0; i < AHEAD && i < f.block_size; i++) prefetch(next + i * row, f.head_size);
        }
        for (long position = first; position < last; position++, at += row) {
            if (position + AHEAD < last) prefetch(at + AHEAD * row, f.head_size);
            visit(position, at);
        }
    }
}

// o[0 .. COUNT vectors) = sum over slots of weight * value, beginning at element `from` of the values.
template <int COUNT, typename Stored>
static inline void gather(void *pool, const Forward &f, const long *table, long group, long seen, const float *weights,
                          long from, float total, float *o) {
    Vector sums[COUNT] = {};
    each_slot<Stored>(pool, f, table, group, seen, [&](long position, const Stored *value) {
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) sums[i] += weights[position] * load(value + from + i * WIDTH);
    });
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) store(o + from + i * WIDTH, sums[i] / total);
}

// One query's attention to slots [0, seen). `scores` takes padded(seen) floats.
template <typename Stored>
static void attend_one(const Forward &f, const float *q, long layer, const long *table, long group, long seen, float scale,
                       float *scores, float *o) {
    const long size = f.head_size;
    each_slot<Stored>(f.keys[layer], f, table, group, seen, [&](long position, const Stored *key) {
        Vector sum{};
        for (long i = 0; i < size; i += WIDTH) sum += load(q + i) * load(key + i);
        scores[position] = sum_of(sum);
    });
    const float highest = highest_of(scores, seen) * scale, total = exponentials(scores, seen, padded(seen), scale, highest);
    long i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) gather<4, Stored>(f.values[layer], f, table, group, seen, scores, i, total, o);
    for (; i < size; i += WIDTH) gather<1, Stored>(f.values[layer], f, table, group, seen, scores, i, total, o);
}

// Memory for many queries of one sequence: `keys` and `values` take size * padded(longest) floats, each.
struct AttentionRoom {
    float *keys, *turned, *values, *scores;
};

template <typename Stored>
static void attend_many(const Forward &f, const float *q, long q_row, long layer, const long *table, long group, long start,
                        long count, float scale, const AttentionRoom &room, float *o, long o_row) {
    const long size = f.head_size, seen_at_last = start + count, width = padded(seen_at_last);
    const auto copy = [&](void *pool, float *to) {
        each_slot<Stored>(pool, f, table, group, seen_at_last, [&](long position, const Stored *from) {
            for (long i = 0; i < size; i += WIDTH) store(to + position * size + i, load(from + i));
        });
    };
    copy(f.keys[layer], room.keys);
    copy(f.values[layer], room.values);
    transpose(room.keys, size, seen_at_last, size, room.turned);
    for (long head = 0; head < f.heads / f.groups; head++)
        for (long at = 0; at < count; at += QUERIES) {
            const long rows = at + QUERIES < count ? QUERIES : count - at, seen = start + at + rows;
            float *out = o + at * o_row + head * size, totals[QUERIES];
            product<false>(q + at * q_row + head * size, q_row, 1, room.turned, width, size, room.scores, width, rows,
                           padded(seen));
            for (long r = 0; r < rows; r++) {
                float *row = room.scores + r * width;
                const long visible = start + at + r + 1;
                totals[r] = exponentials(row, visible, padded(seen), scale, highest_of(row, visible) * scale);
            }
            product<false>(room.scores, width, 1, room.values, size, seen, out, o_row, rows, size);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < size; i += WIDTH) store(out + r * o_row + i, load(out + r * o_row + i) / totals[r]);
        }
}

// Keys and values of a sequence's new tokens into the cache, and its queries' attention, for one group of heads.
template <typename Stored>
static void attend(const Forward &f, const Layer &layer, long number, long sequence, long group, float *joint, float *o,
                   const AttentionRoom &room) {
    const long size = f.head_size, query_size = f.heads * size, row = query_size + 2 * f.groups * size;
    const long start = f.starts[sequence], first = f.firsts[sequence], count = f.firsts[sequence + 1] - first;
    const long *table = f.tables + sequence * f.table_row;
    const long per_group = f.heads / f.groups;
    for (long t = 0; t < count; t++) {
        const float *cosines = f.cosines + (start + t) * size / 2, *sines = f.sines + (start + t) * size / 2;
        float *token = joint + (first + t) * row, *key = token + query_size + group * size;
        const float *value = key + f.groups * size;
        for (long head = 0; head < per_group; head++)
            turn(token + (group * per_group + head) * size, layer.query_norm, f.eps, cosines, sines, size);
        turn(key, layer.key_norm, f.eps, cosines, sines, size);
        Stored *key_slot = slot_of<Stored>(f.keys[number], f, table, start + t, group);
        Stored *value_slot = slot_of<Stored>(f.values[number], f, table, start + t, group);
        for (long i = 0; i < size; i += WIDTH) store(key_slot + i, load(key + i)), store(value_slot + i, load(value + i));
    }
    const float *q = joint + first * row + group * per_group * size;
    float *out = o + first * query_size + group * per_group * size;
    const float scale = 1.0f / sqrtf(static_cast<float>(size));
    if (count > 1)
        return attend_many<Stored>(f, q, row, number, table, group, start, count, scale, room, out, query_size);
    for (long head = 0; head < per_group; head++)
        attend_one<Stored>(f, q + head * size, number, table, group, start + 1, scale, room.scores, out + head * size);
}

// f.x: embeddings of the new tokens in, normalised hidden states out.
static void forward(const Forward &f) {
    const long query_size = f.heads * f.head_size, joint_row = query_size + 2 * f.groups * f.head_size;
    const long rows = f.rows, sequences = f.sequences;
    long widest = f.dim > query_size ? f.dim : query_size, longest = 0, most = 0;
    for (long i = 0; i < f.layers; i++) widest = f.layer[i].down.inputs > widest ? f.layer[i].down.inputs : widest;
    for (long i = 0; i < sequences; i++) {
        const long count = f.firsts[i + 1] - f.firsts[i], seen = f.starts[i] + count;
        longest = seen > longest ? seen : longest;
        most = count > 1 && seen > most ? seen : most;
    }
    Scratch joint(rows * (joint_row > widest ? joint_row : widest)), gate(rows * widest), inner(rows * widest), numbers(numbers_of(rows, widest));
    Scratch counters(f.layers * 6 * 2);  // pieces taken of each product
    long *counts = reinterpret_cast<long *>(counters.data);
    for (long i = 0; i < f.layers * 6; i++) counts[i] = 0;
    const auto inputs_of = [&](long size) { return Inputs{inner.data, rounded_in(numbers.data, rows, size)}; };
    for (long i = f.firsts[sequences] * query_size; i < rows * query_size; i++) inner.data[i] = 0;  // rows of no sequence
#pragma omp parallel
    {
        const long room_size = padded(most) * f.head_size;
        Scratch memory(BENCH + rows * BENCH_ROW);
        Scratch keys(room_size), turned(room_size), values(room_size);
        Scratch scores((most ? QUERIES : 1) * padded(longest) + WIDTH);
        const Worker w{omp_get_thread_num(), omp_get_num_threads(), bench_in(memory.data)};
        const AttentionRoom room{keys.data, turned.data, values.data, scores.data};
        long first, last;
        for (long number = 0; number < f.layers; number++) {
            const Layer &layer = f.layer[number];
            long *taken = counts + number * 6;
            const Map *joint_maps[] = {&layer.query, &layer.key, &layer.value};
            const Map *wide_maps[] = {&layer.gate, &layer.up};
            const Map *output = &layer.output, *down = &layer.down;

            const Inputs normed = inputs_of(f.dim);
            normalize_rows(w, f.x, layer.attention_norm, rows, f.dim, f.eps, inner.data);
            round_rows(w, normed, joint_maps, 3);
#pragma omp barrier
            multiply(w, normed, layer.query, taken, joint.data, false);
            multiply(w, normed, layer.key, taken + 1, joint.data + query_size, false);
            multiply(w, normed, layer.value, taken + 2, joint.data + query_size + f.groups * f.head_size, false);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (long item = 0; item < sequences * f.groups; item++) {
                if (f.wide_cache)
                    attend<float>(f, layer, number, item / f.groups, item % f.groups, joint.data, inner.data, room);
                else
                    attend<unsigned short>(f, layer, number, item / f.groups, item % f.groups, joint.data, inner.data, room);
            }
            const Inputs mixed = inputs_of(query_size);
            round_rows(w, mixed, &output, 1);
#pragma omp barrier
            multiply(w, mixed, layer.output, taken + 3, f.x, true);
#pragma omp barrier
            normalize_rows(w, f.x, layer.feed_forward_norm, rows, f.dim, f.eps, inner.data);
            round_rows(w, normed, wide_maps, 2);
#pragma omp barrier
            each_piece(down->inputs, taken + 4, [&](long from, long to, long next) {
                multiply(w, normed, layer.gate, from, to, next, gate.data, false);
                multiply(w, normed, layer.up, from, to, next, joint.data, false);
                for (long r = 0; r < rows; r++)
                    for (long i = r * down->inputs + from; i < r * down->inputs + to; i += WIDTH)
                        store(gate.data + i, silu(load(gate.data + i)) * load(joint.data + i));
            });
#pragma omp barrier
            const Inputs wide{gate.data, inputs_of(down->inputs).rounded};
            round_rows(w, wide, &down, 1);
#pragma omp barrier
            multiply(w, wide, layer.down, taken + 5, f.x, true);
#pragma omp barrier
        }
        share(w, rows, 1, first, last);
        for (long r = first; r < last; r++) normalize(f.x + r * f.dim, f.norm, f.dim, f.eps, f.x + r * f.dim);
    }
}

// y = x W^T + bias for one map; y is [rows, outputs].
static void multiply_alone(const Map &map, const float *x, long rows, float *y) {
    const long size = map.inputs;
    Scratch numbers(numbers_of(rows, size));
    const Inputs inputs{const_cast<float *>(x), rounded_in(numbers.data, rows, size)};
    const Map *maps[] = {&map};
    long taken = 0;
#pragma omp parallel
    {
        Scratch memory(BENCH + rows * BENCH_ROW);
        const Worker w{omp_get_thread_num(), omp_get_num_threads(), bench_in(memory.data)};
        round_rows(w, inputs, maps, 1);
#pragma omp barrier
        multiply(w, inputs, map, &taken, y, false);
    }
}
