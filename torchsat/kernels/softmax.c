/* The statistics of a softmax, such as the weights of an attention, row by row. */

#include "vectors.h"

/* The row of a softmax, as observe_softmax in softmax.py describes it. It is empty when it is passed.
   z: [batch, heads, queries, keys], with these sizes and strides, which were read of `elements` logits. visible: bytes, with strides of their own (0
   where they are broadcast). */
void torchsat_softmax(const vector *z_in, const uint8_t *visible, const int64_t *sizes, const int64_t *z_strides, const int64_t *visible_strides,
                      double elements, double *row)
{
    int64_t keys = sizes[3];
    double z[BLOCK], seen[BLOCK];
    int64_t width = width_of(z_in);
    double all = (double)(sizes[0] * sizes[1] * sizes[2] * keys), weight = all > 0 ? elements / all : 1;
    row[ELEMENTS] = elements;
    for (int64_t query = 0; query < sizes[0] * sizes[1] * sizes[2]; query++) {
        int64_t at[3] = { query / (sizes[1] * sizes[2]), query / sizes[2] % sizes[1], query % sizes[2] };
        int64_t z_at = at[0] * z_strides[0] + at[1] * z_strides[1] + at[2] * z_strides[2];
        const uint8_t *see = visible + at[0] * visible_strides[0] + at[1] * visible_strides[1] + at[2] * visible_strides[2];
        vector here = { (const char *)z_in->data + z_at * width, z_in->kind, z_strides[3] };
        double n = 0, bad = 0, top = -INFINITY, bottom = INFINITY, sum = 0, square = 0;
        double total = 0, total_square = 0, nonzero = 0, least = INFINITY;
        for (int64_t first = 0; first < keys; first += BLOCK) {
            int m = keys - first < BLOCK ? (int)(keys - first) : BLOCK;
            load(&here, first, m, z);
            for (int i = 0; i < m; i++) seen[i] = see[(first + i) * visible_strides[3]] ? 1.0 : 0.0;
#pragma omp simd reduction(+ : n, bad, sum, square) reduction(max : top) reduction(min : bottom)
            for (int i = 0; i < m; i++) {
                double good = z[i] * 0 == 0 ? seen[i] : 0.0, v = good != 0 ? z[i] : 0.0;
                double high = good != 0 ? v : -INFINITY, low = good != 0 ? v : INFINITY;
                n += seen[i];
                bad += seen[i] - good;
                sum += v;
                square += v * v;
                top = high > top ? high : top;
                bottom = low < bottom ? low : bottom;
            }
        }
        if (bad > 0) row[NONFINITE] += n;
        if (bad > 0 || n < 2) continue;
        for (int64_t first = 0; first < keys; first += BLOCK) {
            int m = keys - first < BLOCK ? (int)(keys - first) : BLOCK;
            load(&here, first, m, z);
            for (int i = 0; i < m; i++) seen[i] = see[(first + i) * visible_strides[3]] ? 1.0 : 0.0;
#pragma omp simd reduction(+ : total, total_square, nonzero) reduction(min : least)
            for (int i = 0; i < m; i++) {
                double shifted = seen[i] != 0 ? z[i] - top : 0;
                /* e^-745 is the smallest number above 0 in float64. */
                double e = shifted < -745 ? 0 : exp_negative(shifted) * seen[i], low = seen[i] != 0 ? e : INFINITY;
                total += e;
                total_square += e * e;
                nonzero += e > 0 ? 1.0 : 0.0;
                least = low < least ? low : least;
            }
        }
        row[N] += weight * n;
        row[READ] += n;
        row[Z] += weight * sum;
        row[Z_SQ] += weight * square;
        row[A] += weight;
        row[A_SQ] += weight * (total_square / (total * total));
        row[ZEROS] += weight * (n - nonzero);
        if (top > row[Z_MAX]) row[Z_MAX] = top;
        if (-bottom > row[Z_MIN_NEGATED]) row[Z_MIN_NEGATED] = -bottom;
        if (1 / total > row[A_MAX]) row[A_MAX] = 1 / total;
        if (-least / total > row[A_MIN_NEGATED]) row[A_MIN_NEGATED] = -least / total;
    }
}

/* Of the keys that one query sees: how many there are, the largest and the smallest number, their sum, and whether any is inf or nan. */
typedef struct { double keys, top, bottom, sum; int broken; } range;

/* Merge `m` neighbouring numbers. `see` says which of them are seen; NULL: all. */
#define MERGE_RANGE(name, REAL)                                                                                                                      \
    static void name(const REAL *restrict z, const uint8_t *restrict see, int m, range *into)                                                        \
    {                                                                                                                                                \
        REAL top = -INFINITY, bottom = INFINITY, rest = 0, sum = 0;                                                                                  \
        int keys = see ? 0 : m;                                                                                                                      \
        if (see) {                                                                                                                                   \
            _Pragma("omp simd reduction(+ : keys, rest, sum) reduction(max : top) reduction(min : bottom)") for (int i = 0; i < m; i++)              \
            {                                                                                                                                        \
                REAL high = see[i] ? z[i] : -(REAL)INFINITY, low = see[i] ? z[i] : (REAL)INFINITY;                                                   \
                keys += see[i] ? 1 : 0;                                                                                                              \
                rest += see[i] ? z[i] * 0 : 0;                                                                                                       \
                sum += see[i] ? z[i] : 0;                                                                                                            \
                top = high > top ? high : top;                                                                                                       \
                bottom = low < bottom ? low : bottom;                                                                                                \
            }                                                                                                                                        \
        } else {                                                                                                                                     \
            _Pragma("omp simd reduction(+ : rest, sum) reduction(max : top) reduction(min : bottom)") for (int i = 0; i < m; i++)                    \
            {                                                                                                                                        \
                rest += z[i] * 0;                                                                                                                    \
                sum += z[i];                                                                                                                         \
                top = z[i] > top ? z[i] : top;                                                                                                       \
                bottom = z[i] < bottom ? z[i] : bottom;                                                                                              \
            }                                                                                                                                        \
        }                                                                                                                                            \
        into->keys += keys;                                                                                                                          \
        into->sum += sum;                                                                                                                            \
        into->broken |= rest != 0;                                                                                                                   \
        into->top = top > into->top ? top : into->top;                                                                                               \
        into->bottom = bottom < into->bottom ? bottom : into->bottom;                                                                                \
    }
MERGE_RANGE(merge_floats, float)
MERGE_RANGE(merge_doubles, double)

/* Of the keys that one query sees, with e = exp(z - top): the sums of e, of e (z - top) and of e^2, and those of z - mean and of its square. The mean
   is rounded, so that the sum of z - mean is not quite 0. */
typedef struct { double total, weighted, square, off, off_square; } shape;

/* Merge `m` neighbouring numbers, as MERGE_RANGE does. */
#define MERGE_SHAPE(name, REAL, EXP)                                                                                                                 \
    static void name(const REAL *restrict z, const uint8_t *restrict see, int m, REAL top, REAL mean, shape *into)                                   \
    {                                                                                                                                                \
        REAL total = 0, weighted = 0, square = 0, off = 0, off_square = 0;                                                                           \
        if (see) {                                                                                                                                   \
            _Pragma("omp simd reduction(+ : total, weighted, square, off, off_square)") for (int i = 0; i < m; i++)                                  \
            {                                                                                                                                        \
                REAL below = see[i] ? z[i] - top : 0, apart = see[i] ? z[i] - mean : 0, e = EXP(below) * (see[i] ? 1 : 0);                           \
                total += e;                                                                                                                          \
                weighted += e * below;                                                                                                               \
                square += e * e;                                                                                                                     \
                off += apart;                                                                                                                        \
                off_square += apart * apart;                                                                                                         \
            }                                                                                                                                        \
        } else {                                                                                                                                     \
            _Pragma("omp simd reduction(+ : total, weighted, square, off, off_square)") for (int i = 0; i < m; i++)                                  \
            {                                                                                                                                        \
                REAL below = z[i] - top, apart = z[i] - mean, e = EXP(below);                                                                        \
                total += e;                                                                                                                          \
                weighted += e * below;                                                                                                               \
                square += e * e;                                                                                                                     \
                off += apart;                                                                                                                        \
                off_square += apart * apart;                                                                                                         \
            }                                                                                                                                        \
        }                                                                                                                                            \
        into->total += total;                                                                                                                        \
        into->weighted += weighted;                                                                                                                  \
        into->square += square;                                                                                                                      \
        into->off += off;                                                                                                                            \
        into->off_square += off_square;                                                                                                              \
    }
MERGE_SHAPE(shape_floats, float, exp_negative_float)
MERGE_SHAPE(shape_doubles, double, exp_negative)

/* A part of a row: `m` of its numbers from the key `first` on. `see` is NULL where all are seen. The room for what has to be converted is given. */
typedef struct { const float *floats; double wide[BLOCK]; const uint8_t *see; uint8_t seen[BLOCK]; int m; } part_of_row;

static void read_part(const vector *row, int64_t first, int64_t keys, const uint8_t *visible, int64_t step, part_of_row *into)
{
    int m = into->m = keys - first < BLOCK ? (int)(keys - first) : BLOCK;
    into->see = visible ? visible + first * step : 0;
    if (visible && step != 1) {
        for (int i = 0; i < m; i++) into->seen[i] = visible[(first + i) * step];
        into->see = into->seen;
    }
    into->floats = row->kind == FLOAT32 && row->stride == 1 ? (const float *)row->data + first : 0;
    if (!into->floats) load(row, first, m, into->wide);
}

/* The range of one row of `keys` elements. */
static range range_of(const vector *row, int64_t keys, const uint8_t *visible, int64_t step)
{
    range found = { 0, -INFINITY, INFINITY, 0, 0 };
    part_of_row part;
    for (int64_t first = 0; first < keys; first += BLOCK) {
        read_part(row, first, keys, visible, step, &part);
        if (part.floats)
            merge_floats(part.floats, part.see, part.m, &found);
        else
            merge_doubles(part.wide, part.see, part.m, &found);
    }
    return found;
}

/* The squares of numbers that lie further apart could overflow in float32. */
#define MOST_APART 1e15

/* The shape of one row of `keys` elements that has this range. */
static shape shape_of(const vector *row, int64_t keys, const uint8_t *visible, int64_t step, const range *of)
{
    shape found = { 0, 0, 0, 0, 0 };
    double mean = of->sum / of->keys;
    part_of_row part;
    for (int64_t first = 0; first < keys; first += BLOCK) {
        read_part(row, first, keys, visible, step, &part);
        if (part.floats && of->top - of->bottom < MOST_APART) {
            shape_floats(part.floats, part.see, part.m, (float)of->top, (float)mean, &found);
        } else {
            if (part.floats) load(row, first, part.m, part.wide);
            shape_doubles(part.wide, part.see, part.m, of->top, mean, &found);
        }
    }
    return found;
}

/* Add a row of z to the numbers of its head, whose places in heads[HEAD_COLUMNS] lie `size` apart. */
static void add_to_head(const vector *row, int64_t keys, const uint8_t *visible, int64_t step, const range *of, double *head, int64_t size)
{
    shape found = shape_of(row, keys, visible, step, of);
    double log_keys = log(of->keys), off = found.off / of->keys, first_z;
    int64_t first = 0;
    while (visible && !visible[first * step]) first++;
    load(row, first, 1, &first_z);
    head[ROWS * size] += 1;
    head[ENTROPY * size] += (log(found.total) - found.weighted / found.total) / log_keys;
    head[JACOBIAN * size] += 1 - found.square / (found.total * found.total);
    head[LOGIT_VARIANCE * size] += found.off_square / of->keys - off * off;
    head[LOG_KEYS * size] += log_keys;
    head[FIRST_KEY * size] += exp(first_z - of->top) / found.total;
    head[LOG_Z * size] += log(found.total) + of->top;
    head[LOG_Z_SQ * size] += (log(found.total) + of->top) * (log(found.total) + of->top);
    if (of->top > head[LOGIT_MAX * size]) head[LOGIT_MAX * size] = of->top;
}

/* A tensor [batch, heads, queries, keys], whose axes have these strides. */
typedef struct { vector data; int64_t strides[4]; } four;

/* The row of a tensor at this sample, head and query. */
static vector row_at(const four *of, int64_t sample, int64_t head, int64_t query)
{
    int64_t at = sample * of->strides[0] + head * of->strides[1] + query * of->strides[2];
    vector row = { (const char *)of->data.data + at * width_of(&of->data), of->data.kind, of->strides[3] };
    return row;
}

static const uint8_t *byte_at(const uint8_t *bytes, const int64_t *strides, int64_t sample, int64_t head, int64_t query)
{
    return bytes ? bytes + sample * strides[0] + head * strides[1] + query * strides[2] : 0;
}

/* What scan_softmax in softmax.py finds, in found[FOUND] and in the block of heads, which is empty when it is passed. The heads are divided among
   `parts` threads.
   visible: NULL where each query sees all keys. a: NULL data where torch never computes it. broken: NULL where nothing is known of that. */
void torchsat_scan_softmax(const four *z, const four *a, const int64_t *sizes, const uint8_t *visible, const int64_t *visible_strides,
                           const uint8_t *broken, const int64_t *broken_strides, int64_t parts, double *found, double *block)
{
    double each[PARTS][FOUND];
    int64_t heads = sizes[1], keys = sizes[3];
    if (parts > PARTS) parts = PARTS;
    if (parts > heads) parts = heads;
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) if (parts > 1)
#endif
    for (int64_t part = 0; part < parts; part++) {
        double *mine = each[part];
        nothing_found(mine);
        for (int64_t head = heads * part / parts; head < heads * (part + 1) / parts; head++) {
            for (int64_t sample = 0; sample < sizes[0]; sample++)
                for (int64_t query = 0; query < sizes[2]; query++) {
                    const uint8_t *see = byte_at(visible, visible_strides, sample, head, query);
                    int64_t step = see ? visible_strides[3] : 0;
                    vector row = row_at(z, sample, head, query);
                    range of_z = range_of(&row, keys, see, step);
                    int counts = !of_z.broken && of_z.keys > 1;
                    if (counts) {
                        add_to_head(&row, keys, see, step, &of_z, block + head, heads);
                        mine[Z_BOTTOM_NEGATED] = -of_z.bottom > mine[Z_BOTTOM_NEGATED] ? -of_z.bottom : mine[Z_BOTTOM_NEGATED];
                    }
                    if (a->data.data) {
                        row = row_at(a, sample, head, query);
                        range all = range_of(&row, keys, 0, 0), of_a = see ? range_of(&row, keys, see, step) : all;
                        if (all.broken) mine[BAD] += (double)keys;
                        if (counts && !all.broken) {
                            mine[A_TOP] = all.top > mine[A_TOP] ? all.top : mine[A_TOP];
                            mine[A_BOTTOM_NEGATED] = -of_a.bottom > mine[A_BOTTOM_NEGATED] ? -of_a.bottom : mine[A_BOTTOM_NEGATED];
                        }
                    } else if (of_z.broken) {
                        mine[BAD] += of_z.keys;
                    } else if (of_z.keys == 0 && broken && *byte_at(broken, broken_strides, sample, head, query)) {
                        mine[BAD] += (double)keys;
                    }
                }
            double highest = block[LOGIT_MAX * heads + head];
            mine[Z_TOP] = highest > mine[Z_TOP] ? highest : mine[Z_TOP];
        }
    }
    merge_found(each, parts, found);
}
