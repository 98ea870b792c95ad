/* int8 dense layers, convolutions and additions with x86-64's AVX2, where the processor has it.
 *
 * Numbers are widened to int16, so that VPMADDWD multiplies pairs of them and adds each pair's products exactly; sums
 * wrap at 2^32 as everywhere. In a convolution a vector's lanes are output channels: their weights are packed, pair by
 * pair, once for all pixels.
 */
#include "mote_kernel_list.h"

#include "mote_int8_avx2.h"

#ifdef MOTE_INT8_AVX2
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE static inline __attribute__((target("avx2"), always_inline))

enum { LANES = 8 };

AVX2_INLINE __m256i load(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

AVX2_INLINE void store(void *to, __m256i v)
{
    _mm256_storeu_si256((__m256i *)to, v);
}

/* 16 int8 as int16; 8 of them; 8 as int32. */
AVX2_INLINE __m256i widened(const int8_t *x)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)x));
}

AVX2_INLINE __m128i widened_half(const int8_t *x)
{
    return _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)(const void *)x));
}

AVX2_INLINE __m256i widened_twice(const int8_t *x)
{
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)x));
}

/* How sums are scaled, lane by lane: see mote_scaled. */
typedef struct {
    __m256i multiplier, odd; /* odd: of the lanes 1, 3, 5 and 7, in the lanes below */
    __m256i left, right, rest, half;
} scale_t;

AVX2_INLINE scale_t scale_of(__m256i multiplier, __m256i shift)
{
    const __m256i one = _mm256_set1_epi32(1);
    scale_t s;
    s.multiplier = multiplier;
    s.odd = _mm256_srli_epi64(multiplier, 32);
    s.left = _mm256_max_epi32(shift, _mm256_setzero_si256());
    s.right = _mm256_sub_epi32(s.left, shift);
    s.rest = _mm256_sub_epi32(_mm256_sllv_epi32(one, s.right), one);
    s.half = _mm256_srli_epi32(s.rest, 1);
    return s;
}

/* mote_scaled. */
AVX2_INLINE __m256i scaled(__m256i x, const scale_t *s)
{
    const __m256i up = _mm256_set1_epi64x(1 << 30);
    x = _mm256_sllv_epi32(x, s->left);
    const __m256i even = _mm256_add_epi64(_mm256_mul_epi32(x, s->multiplier), up);
    const __m256i odd = _mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(x, 32), s->odd), up);
    const __m256i high = _mm256_blend_epi32(_mm256_srli_epi64(even, 31), _mm256_slli_epi64(odd, 1), 0xaa);
    const __m256i limit = _mm256_sub_epi32(s->half, _mm256_srai_epi32(high, 31));
    const __m256i above = _mm256_cmpgt_epi32(_mm256_and_si256(high, s->rest), limit);
    return _mm256_sub_epi32(_mm256_srav_epi32(high, s->right), above);
}

/* What outputs have in common. */
typedef struct {
    __m256i zero_point;
    __m128i low, high;
} outputs_t;

AVX2_INLINE outputs_t outputs_of(int32_t zero_point, mote_range_t range)
{
    outputs_t o = {_mm256_set1_epi32(zero_point), _mm_set1_epi8(range.low), _mm_set1_epi8(range.high)};
    return o;
}

/* Eight scaled sums as outputs: writes the first n. */
AVX2_INLINE void put(int8_t *to, __m256i x, const outputs_t *o, uint32_t n)
{
    x = _mm256_add_epi32(x, o->zero_point);
    __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_min_epi8(_mm_max_epi8(_mm_packs_epi16(y, y), o->low), o->high);
    if (n == LANES) {
        _mm_storel_epi64((__m128i *)(void *)to, y);
    } else {
        int8_t bytes[2 * LANES];
        _mm_storeu_si128((__m128i *)(void *)bytes, y);
        memcpy(to, bytes, n);
    }
}

/* Of n <= 8 output channels: the biases, and how the sums are scaled. Lanes beyond are 0. */
typedef struct {
    __m256i bias;
    scale_t scale;
} channels_t;

AVX2_INLINE channels_t channels_of(const mote_requant_t *r, uint32_t n)
{
    int32_t bias[LANES] = {0}, multiplier[LANES] = {0}, shift[LANES] = {0};
    for (uint32_t i = 0; i < n; i++) {
        bias[i] = r[i].bias;
        multiplier[i] = r[i].multiplier;
        shift[i] = r[i].shift;
    }
    channels_t c = {load(bias), scale_of(load(multiplier), load(shift))};
    return c;
}

/* acc + the eight sums of products of 16 pairs. */
AVX2_INLINE __m256i plus_products(__m256i acc, __m256i a, __m256i b)
{
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
}

AVX2 int32_t mote_int8_dot_avx2(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n)
{
    __m256i sums = _mm256_setzero_si256();
    for (; n >= 16; n -= 16, w += 16, x += 16) {
        sums = plus_products(sums, widened(w), widened(x));
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    acc = mote_wrapped_sum(acc, _mm_cvtsi128_si32(sum));
    for (; n > 0; n--) {
        acc = mote_wrapped_sum(acc, *w++ * *x++);
    }
    return acc;
}

AVX2 void mote_int8_dots_avx2(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    const int8_t *w2 = w + 2 * (size_t)row;
    for (; n >= 16; n -= 16, w += 16, w2 += 16, x += 16) {
        const __m256i values = widened(x);
        a = plus_products(a, widened(w), values);
        b = plus_products(b, widened(w + row), values);
        c = plus_products(c, widened(w2), values);
        d = plus_products(d, widened(w2 + row), values);
    }
    const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    if (n >= 8) {
        const __m128i values = widened_half(x);
        const __m128i ab =
            _mm_hadd_epi32(_mm_madd_epi16(widened_half(w), values), _mm_madd_epi16(widened_half(w + row), values));
        const __m128i cd =
            _mm_hadd_epi32(_mm_madd_epi16(widened_half(w2), values), _mm_madd_epi16(widened_half(w2 + row), values));
        sums = _mm_add_epi32(sums, _mm_hadd_epi32(ab, cd));
        n -= 8, w += 8, x += 8;
    }
    sums = _mm_add_epi32(sums, _mm_loadu_si128((const __m128i *)(const void *)acc));
    _mm_storeu_si128((__m128i *)(void *)acc, sums);
    for (uint32_t f = 0; f < 4; f++, w += row) {
        for (uint32_t i = 0; i < n; i++) {
            acc[f] = mote_wrapped_sum(acc[f], w[i] * x[i]);
        }
    }
}

enum { PIXELS = 4, FILTERS = 2 * LANES, MOST_TAPS = 1024 };

/* What is computed at a time: 16 output channels of four pixels. */
typedef struct {
    __m256i weights[MOST_TAPS / 2][2];    /* of every channel a pair of taps as int16, 0 beyond the last tap */
    int16_t taps[PIXELS][MOST_TAPS + 16]; /* of every pixel; 16 more, so that rows lie apart in the cache */
    channels_t channels[2];
} block_t;

/* Eight rows of eight int32, transposed: what was in column i goes to to[2 * i]. */
AVX2_INLINE void transpose(__m256i *to, const __m256i from[LANES])
{
    __m256i two[LANES], four[LANES];
    for (int i = 0; i < LANES; i += 2) {
        two[i] = _mm256_unpacklo_epi32(from[i], from[i + 1]);
        two[i + 1] = _mm256_unpackhi_epi32(from[i], from[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        four[i] = _mm256_unpacklo_epi64(two[i], two[i + 2]);
        four[i + 1] = _mm256_unpackhi_epi64(two[i], two[i + 2]);
        four[i + 2] = _mm256_unpacklo_epi64(two[i + 1], two[i + 3]);
        four[i + 3] = _mm256_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        to[2 * i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
        to[2 * (i + 4)] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
    }
}

/* The weights of n <= 8 channels, `row` taps each, into one half of the vectors. */
AVX2 static void pack(__m256i (*to)[2], uint32_t half, const int8_t *w, uint32_t row, uint32_t n)
{
    for (uint32_t k = 0; k < row; k += 16, to += LANES) {
        __m256i rows[LANES];
        for (uint32_t f = 0; f < LANES; f++) {
            if (f >= n) {
                rows[f] = _mm256_setzero_si256();
            } else if (row - k >= 16) {
                rows[f] = widened(w + f * row + k);
            } else {
                int8_t rest[16] = {0};
                memcpy(rest, w + f * row + k, row - k);
                rows[f] = widened(rest);
            }
        }
        transpose(&to[0][half], rows);
    }
}

/* n numbers, widened. */
AVX2_INLINE int16_t *copy(int16_t *to, const int8_t *x, uint32_t n)
{
    int16_t *end = to + n;
    if (n >= 16) {
        for (; n >= 16; n -= 16, x += 16, to += 16) {
            store(to, widened(x));
        }
        if (n > 0) { /* the last 16 */
            store(end - 16, widened(x + n - 16));
        }
        return end;
    }
    if (n >= 8) {
        _mm_storeu_si128((__m128i *)(void *)to, widened_half(x));
        n -= 8, x += 8, to += 8;
    }
    for (; n > 0; n--) {
        *to++ = *x++;
    }
    return end;
}

AVX2_INLINE int16_t *fill(int16_t *to, int16_t value, uint32_t n)
{
    for (; n > 0; n--) {
        *to++ = value;
    }
    return to;
}

/* The taps of the window that begins at row y, column x of the input, and a 0 behind them. */
AVX2 static void gather(const mote_op_t *op, const mote_tensor_t *in, const int8_t *input, int16_t *to, int32_t y,
                        int32_t x)
{
    const uint32_t channels = in->c, step = op->dilation_w;
    uint32_t first = 0, last = op->kernel_w; /* of the columns that lie inside */
    while (first < last && x + (int32_t)(first * step) < 0) {
        first++;
    }
    while (last > first && x + (int32_t)((last - 1) * step) >= in->w) {
        last--;
    }
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        if (y < 0 || y >= in->h) {
            to = fill(to, in->zero_point, op->kernel_w * channels);
            continue;
        }
        const int8_t *from = input + (y * in->w + x + (int32_t)(first * step)) * (int32_t)channels;
        to = fill(to, in->zero_point, first * channels);
        if (step == 1) {
            to = copy(to, from, (last - first) * channels);
        } else {
            for (uint32_t j = first; j < last; j++, from += step * channels) {
                to = copy(to, from, channels);
            }
        }
        to = fill(to, in->zero_point, (op->kernel_w - last) * channels);
    }
    *to = 0;
}

/* A pair of taps in every lane. */
AVX2_INLINE __m256i pair(const int16_t *taps)
{
    int32_t both;
    memcpy(&both, taps, sizeof both);
    return _mm256_set1_epi32(both);
}

/* The first n <= 16 channels of four pixels that lie `step` bytes apart, or of the first of them. */
AVX2 static void run_block(const block_t *b, uint32_t pairs, const outputs_t *o, int8_t *to, uint32_t step,
                           uint32_t pixels, uint32_t n)
{
    const __m256i low = b->channels[0].bias, high = b->channels[1].bias;
    __m256i a0 = low, a1 = high, b0 = low, b1 = high, c0 = low, c1 = high, d0 = low, d1 = high;
    const int16_t *taps = b->taps[0];
    for (uint32_t k = 0; k < pairs; k++, taps += 2) {
        const __m256i w0 = b->weights[k][0], w1 = b->weights[k][1];
        __m256i x = pair(taps);
        a0 = plus_products(a0, w0, x);
        a1 = plus_products(a1, w1, x);
        x = pair(taps + (MOST_TAPS + 16));
        b0 = plus_products(b0, w0, x);
        b1 = plus_products(b1, w1, x);
        x = pair(taps + 2 * (MOST_TAPS + 16));
        c0 = plus_products(c0, w0, x);
        c1 = plus_products(c1, w1, x);
        x = pair(taps + 3 * (MOST_TAPS + 16));
        d0 = plus_products(d0, w0, x);
        d1 = plus_products(d1, w1, x);
    }
    const __m256i sums[PIXELS][2] = {{a0, a1}, {b0, b1}, {c0, c1}, {d0, d1}};
    for (uint32_t p = 0; p < pixels; p++, to += step) {
        put(to, scaled(sums[p][0], &b->channels[0].scale), o, n < LANES ? n : LANES);
        if (n > LANES) {
            put(to + LANES, scaled(sums[p][1], &b->channels[1].scale), o, n - LANES);
        }
    }
}

/* Output channels first ... first + n - 1 of all pixels, n <= 16. */
AVX2 static void run_filters(block_t *b, const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants,
                             uint32_t first, uint32_t n)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c, size = (uint32_t)out->h * out->w;
    const outputs_t o = outputs_of(out->zero_point, constants->range);
    const int8_t *input = mote_read(m, op->in), *w = constants->weights + (size_t)first * row;
    int8_t *to = (int8_t *)mote_write(m, op->out) + first;
    const uint32_t lower = n < LANES ? n : LANES;
    b->channels[0] = channels_of(constants->requant + first, lower);
    b->channels[1] = channels_of(constants->requant + first + lower, n - lower);
    pack(b->weights, 0, w, row, lower);
    pack(b->weights, 1, w + lower * row, row, n - lower);
    int32_t y = 0, x = 0;
    for (uint32_t pixel = 0; pixel < size; pixel += PIXELS) {
        const uint32_t pixels = size - pixel < PIXELS ? size - pixel : PIXELS;
        for (uint32_t p = 0; p < pixels; p++) {
            gather(op, in, input, b->taps[p], y * op->stride_h - op->pad_top, x * op->stride_w - op->pad_left);
            if (++x == out->w) {
                x = 0;
                y++;
            }
        }
        run_block(b, (row + 1) / 2, &o, to, out->c, pixels, n);
        to += PIXELS * out->c;
    }
}

uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    if (!mote_has_avx2() || (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c > MOST_TAPS) {
        return 0;
    }
    block_t block;
    memset(block.taps, 0, sizeof block.taps);
    for (uint32_t first = 0; first < out->c; first += FILTERS) {
        run_filters(&block, m, op, constants, first, out->c - first < FILTERS ? out->c - first : FILTERS);
    }
    return (uint32_t)out->h * out->w;
}

enum { MOST_WINDOW = 64 };

/* Eight channels of a depthwise convolution. */
typedef struct {
    __m256i weights[MOST_WINDOW / 2]; /* of every channel a pair of taps as int16, 0 beyond the last tap */
    channels_t channels;
} slice_t;

/* The sums of eight channels, whose taps lie at the given offsets. An odd one is multiplied by 0. */
AVX2_INLINE __m256i sums_of(const slice_t *s, const int8_t *x, const uint32_t *offsets, uint32_t taps)
{
    __m256i acc = s->channels.bias;
    for (uint32_t k = 0; k < taps; k += 2) {
        const __m128i a = _mm_loadl_epi64((const __m128i *)(const void *)(x + offsets[k]));
        const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)(x + offsets[k + 1]));
        acc = plus_products(acc, s->weights[k / 2], _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
    }
    return acc;
}

/* n <= 8 channels of the window that begins at row y, column x of the input. */
static void gather_window(const mote_op_t *op, const mote_tensor_t *in, const int8_t *input, int8_t (*to)[LANES],
                          int32_t y, int32_t x, uint32_t n)
{
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        int32_t column = x;
        for (uint32_t j = 0; j < op->kernel_w; j++, column += op->dilation_w, to++) {
            if (y >= 0 && y < in->h && column >= 0 && column < in->w) {
                memcpy(*to, input + (uint32_t)(y * in->w + column) * in->c, n);
            } else {
                memset(*to, in->zero_point, n);
            }
        }
    }
}

/* Output channels first ... first + n - 1 of all pixels, n <= 8. */
AVX2 static void run_slice(slice_t *s, const mote_t *m, const mote_op_t *op, uint32_t first, uint32_t n)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_int8_constants_t constants = mote_int8_constants(m, op);
    const outputs_t o = outputs_of(out->zero_point, constants.range);
    const uint32_t channels = in->c, taps = (uint32_t)op->kernel_h * op->kernel_w;
    const int32_t height = (op->kernel_h - 1) * op->dilation_h + 1, width = (op->kernel_w - 1) * op->dilation_w + 1;
    int8_t window[MOST_WINDOW + 1][LANES] = {{0}};
    uint32_t inside[MOST_WINDOW + 1] = {0}, gathered[MOST_WINDOW + 1] = {0};
    for (uint32_t k = 0; k < taps; k++) {
        inside[k] = (k / op->kernel_w * op->dilation_h * in->w + k % op->kernel_w * op->dilation_w) * channels;
        gathered[k] = k * LANES;
    }
    s->channels = channels_of(constants.requant + first, n);
    for (uint32_t k = 0; k < taps; k += 2) {
        int8_t pairs[2 * LANES] = {0};
        for (uint32_t c = 0; c < n; c++) {
            pairs[2 * c] = constants.weights[k * channels + first + c];
            pairs[2 * c + 1] = k + 1 < taps ? constants.weights[(k + 1) * channels + first + c] : 0;
        }
        s->weights[k / 2] = widened(pairs);
    }
    const int8_t *input = (const int8_t *)mote_read(m, op->in) + first;
    int8_t *to = (int8_t *)mote_write(m, op->out) + first;
    for (int32_t i = 0; i < out->h; i++) {
        const int32_t y = i * op->stride_h - op->pad_top;
        for (int32_t j = 0; j < out->w; j++, to += channels) {
            const int32_t x = j * op->stride_w - op->pad_left;
            __m256i sums;
            if (n == LANES && y >= 0 && y + height <= in->h && x >= 0 && x + width <= in->w) {
                sums = sums_of(s, input + (uint32_t)(y * in->w + x) * channels, inside, taps);
            } else {
                gather_window(op, in, input, window, y, x, n);
                sums = sums_of(s, window[0], gathered, taps);
            }
            put(to, scaled(sums, &s->channels.scale), &o, n);
        }
    }
}

int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op)
{
    const uint32_t channels = mote_tensor(m, op->out)->c;
    if (!mote_has_avx2() || mote_tensor(m, op->in)->c != channels || op->kernel_h * op->kernel_w > MOST_WINDOW) {
        return 0;
    }
    slice_t slice;
    for (uint32_t first = 0; first < channels; first += LANES) {
        if (channels - first < LANES && channels >= LANES) {
            first = channels - LANES; /* the last eight, of which some are computed twice */
        }
        run_slice(&slice, m, op, first, channels < LANES ? channels : LANES);
    }
    return 1;
}

/* (x + offset) * 2^left_shift, scaled. */
typedef struct {
    __m256i offset;
    __m128i left;
    scale_t scale;
} term_t;

AVX2_INLINE term_t term_of(int32_t offset, int32_t left_shift, int32_t multiplier, int32_t shift)
{
    term_t t = {_mm256_set1_epi32(offset), _mm_cvtsi32_si128(left_shift),
                scale_of(_mm256_set1_epi32(multiplier), _mm256_set1_epi32(shift))};
    return t;
}

AVX2_INLINE __m256i term(const int8_t *x, const term_t *t)
{
    return scaled(_mm256_sll_epi32(_mm256_add_epi32(widened_twice(x), t->offset), t->left), &t->scale);
}

AVX2 uint32_t mote_int8_add_avx2(const mote_int8_add_t *a, const int8_t *x, const int8_t *x2, int8_t *y, uint32_t n)
{
    const term_t first = term_of(a->in_offset, a->left_shift, a->in_multiplier, a->in_shift);
    const term_t second = term_of(a->in2_offset, a->left_shift, a->in2_multiplier, a->in2_shift);
    const scale_t scale = scale_of(_mm256_set1_epi32(a->out_multiplier), _mm256_set1_epi32(a->out_shift));
    const outputs_t o = outputs_of(a->out_offset, a->range);
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        put(y + i, scaled(_mm256_add_epi32(term(x + i, &first), term(x2 + i, &second)), &scale), &o, LANES);
    }
    return i;
}

#endif
