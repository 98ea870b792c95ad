/* int8 dense and convolutions whose weights can train, and through which gradients pass: "On-Device Training Under
 * 256KB Memory" (Lin et al. 2022).
 *
 * The values that they compute are int8, the bytes of the frozen operators; gradients are float32, with respect to the
 * real values. An output that is clamped passes none. As real = scale * q, a step of gradient descent on a real weight
 * is step * gradient / scale on q: their quantisation-aware scaling, so that one rate suits all scales. It is mostly
 * less than 1, so it is rounded at random, up with the probability of its fraction. */
#include <string.h>

#include "mote_kernel_list.h"

#include "mote_int8.h"

enum { CHUNK = 4 /* channels at a time */ };

/* An op's parts. */
typedef struct {
    const mote_tensor_t *in, *out;
    mote_range_t range;
    const mote_requant_t *requant;
    const float *scales;     /* of the weights, by output channel */
    const int8_t *w, *fixed; /* weights of the first `split` output channels, and of the others */
    const int32_t *b;        /* of the first op->trained */
    int8_t *dw;              /* w and b, or NULL where they do not train now */
    int32_t *db;
    uint32_t split;
    uint32_t taps; /* weights of one output channel */
} parts_t;

static uint32_t padded(uint32_t bytes)
{
    return (bytes + 3) & ~3u;
}

static parts_t parts_of(const mote_t *m, const mote_op_t *op, uint32_t taps)
{
    const mote_int8_constants_t c = mote_int8_constants(m, op);
    uint8_t *trained = m->arena + op->params;
    int now = op->trained != 0 && (m->mask >> op->layer & 1u);
    parts_t p = {mote_tensor(m, op->in),
                 mote_tensor(m, op->out),
                 c.range,
                 c.requant,
                 NULL,
                 NULL,
                 NULL,
                 NULL,
                 NULL,
                 NULL,
                 op->flags & MOTE_TRAINS_WEIGHTS ? op->trained : 0u,
                 taps};
    p.scales = (const float *)(const void *)c.weights;
    p.fixed = (const int8_t *)(p.scales + p.out->c);
    p.w = (const int8_t *)trained;
    p.dw = now && p.split != 0 && !(m->biases_only >> op->layer & 1u) ? (int8_t *)trained : NULL;
    trained += padded(p.split * taps);
    p.b = (const int32_t *)(const void *)trained;
    p.db = now ? (int32_t *)(void *)trained : NULL;
    return p;
}

/* What all kinds check. */
static int parts_fit(const mote_t *m, const mote_op_t *op, uint64_t taps)
{
    const uint64_t channels = mote_tensor(m, op->out)->c;
    const uint64_t split = op->flags & MOTE_TRAINS_WEIGHTS ? op->trained : 0;
    if (taps > MOTE_MAX_BYTES || taps * channels > MOTE_MAX_BYTES ||
        !mote_int8_constants_fit(m, op, channels * sizeof(float) + taps * (channels - split))) {
        return 0;
    }
    const float *scales = (const float *)(const void *)mote_int8_constants(m, op).weights;
    for (uint32_t o = 0; o < channels; o++) {
        if (!(scales[o] > 0.0f) || !mote_finite(scales[o])) {
            return 0;
        }
    }
    return op->trained == 0 ||
           (mote_params_fit(m, op, padded((uint32_t)(taps * split)) + sizeof(int32_t) * (uint64_t)op->trained));
}

int mote_trained_int8_dense_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    return mote_size(out) == out->c && parts_fit(m, op, mote_size(mote_tensor(m, op->in)));
}

static uint32_t filter_taps(const mote_t *m, const mote_op_t *op)
{
    return (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
}

int mote_trained_int8_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t taps = (uint64_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    return mote_windows_fit(m, op) && parts_fit(m, op, taps);
}

int mote_trained_int8_depthwise_check(const mote_t *m, const mote_op_t *op)
{
    return mote_tensor(m, op->out)->c % mote_tensor(m, op->in)->c == 0 && mote_windows_fit(m, op) &&
           parts_fit(m, op, (uint64_t)op->kernel_h * op->kernel_w);
}

/* The weights of an output channel: `taps` of them, `row` apart. */
typedef struct {
    const int8_t *w;
    uint32_t row;
} filter_t;

/* Of dense and convolution. */
static filter_t filter_of(const parts_t *p, uint32_t o)
{
    filter_t f = {o < p->split ? p->w + o * p->taps : p->fixed + (o - p->split) * p->taps, 1};
    return f;
}

static filter_t depthwise_filter_of(const parts_t *p, uint32_t o)
{
    filter_t trained = {p->w + o, p->split}, fixed = {p->fixed + (o - p->split), p->out->c - p->split};
    return o < p->split ? trained : fixed;
}

/* requant of channel o < op->trained with its bias as it is now. */
static mote_requant_t requant_of(const parts_t *p, uint32_t o, filter_t filter)
{
    mote_requant_t r = p->requant[o];
    if (o < p->split) { /* what the input's zero point takes off moves with the weights */
        int32_t sum = 0;
        for (uint32_t i = 0; i < p->taps; i++) {
            sum = mote_wrapped_sum(sum, filter.w[i * filter.row]);
        }
        r.bias = (int32_t)(0u - (uint32_t)sum * (uint32_t)(int32_t)p->in->zero_point);
    }
    r.bias = mote_wrapped_sum(r.bias, p->b[o]);
    return r;
}

/* Output channels first ... first + count - 1: at most CHUNK of those that train, whose requants are `trained`, or all
 * others. A row of a depthwise one's weights has `row` channels. */
typedef struct {
    mote_int8_constants_t constants;
    uint32_t row, first, count;
    mote_requant_t trained[CHUNK];
} chunk_t;

/* The chunk behind this one. 1 if there is another. */
static int next(const mote_t *m, const mote_op_t *op, uint32_t taps, chunk_t *chunk)
{
    const parts_t p = parts_of(m, op, taps);
    const int depthwise = op->kind == MOTE_TRAINED_INT8_DEPTHWISE;
    const uint32_t o = chunk->first += chunk->count;
    if (o == p.out->c) {
        return 0;
    }
    const filter_t first = depthwise ? depthwise_filter_of(&p, o) : filter_of(&p, o);
    chunk->constants.range = p.range;
    chunk->constants.weights = first.w;
    chunk->constants.requant = p.requant + o;
    chunk->row = first.row;
    chunk->count = p.out->c - o;
    if (o < op->trained) {
        chunk->constants.requant = chunk->trained;
        for (chunk->count = 0; chunk->count < CHUNK && o + chunk->count < op->trained; chunk->count++) {
            const uint32_t at = o + chunk->count;
            const filter_t filter = depthwise ? depthwise_filter_of(&p, at) : filter_of(&p, at);
            chunk->trained[chunk->count] = requant_of(&p, at, filter);
        }
    }
    return 1;
}

void mote_trained_int8_dense(const mote_t *m, const mote_op_t *op)
{
    chunk_t chunk = {.first = 0, .count = 0};
    while (next(m, op, mote_size(mote_tensor(m, op->in)), &chunk)) {
        mote_int8_dense_part(m, op, &chunk.constants, chunk.first, chunk.count);
    }
}

/* Of a convolution some of whose channels train. */
static MOTE_APART void conv2d_chunks(const mote_t *m, const mote_op_t *op)
{
    chunk_t chunk = {.first = 0, .count = 0};
    while (next(m, op, filter_taps(m, op), &chunk)) {
        mote_int8_conv2d_part(m, op, &chunk.constants, chunk.first, chunk.count, 0);
    }
}

/* Of one none of whose channels train. */
static MOTE_APART void conv2d_whole(const mote_t *m, const mote_op_t *op)
{
    mote_int8_constants_t c = mote_int8_constants(m, op);
    c.weights += mote_tensor(m, op->out)->c * sizeof(float); /* behind their scales */
    mote_int8_conv2d_whole(m, op, &c);
}

void mote_trained_int8_conv2d(const mote_t *m, const mote_op_t *op)
{
    if (op->trained != 0) {
        conv2d_chunks(m, op);
    } else {
        conv2d_whole(m, op);
    }
}

void mote_trained_int8_depthwise(const mote_t *m, const mote_op_t *op)
{
    chunk_t chunk = {.first = 0, .count = 0};
    while (next(m, op, (uint32_t)op->kernel_h * op->kernel_w, &chunk)) {
        mote_int8_depthwise_part(m, op, &chunk.constants, chunk.row, chunk.first, chunk.count);
    }
}

/* x to an integer, at random: up with the probability of its fraction, so that the mean is x. Beyond +-2^24 it stays
 * there; not a number is 0. */
static int32_t rounded_at_random(mote_t *m, float x)
{
    const float most = 16777216.0f;
    if (x == 0.0f || !(x > -most && x < most)) {
        return x >= most ? (int32_t)most : x <= -most ? -(int32_t)most : 0;
    }
    int32_t whole = (int32_t)x;
    whole -= (float)whole > x; /* the floor */
    m->random ^= m->random << 13;
    m->random ^= m->random >> 17;
    m->random ^= m->random << 5;
    return whole + ((float)(m->random >> 8) < (x - (float)whole) * most);
}

static int8_t moved_weight(mote_t *m, int8_t w, float step)
{
    int32_t to = w + rounded_at_random(m, step);
    return (int8_t)(to < -INT8_MAX ? -INT8_MAX : to > INT8_MAX ? INT8_MAX : to);
}

/* What the sum of dy * (x - zero point) is multiplied by to get the step of a weight of output channel o. */
static float weight_step(const mote_t *m, const parts_t *p, uint32_t o)
{
    return m->step * (p->in->scale / p->scales[o]);
}

/* The gradient with respect to the outputs, without those that are clamped. */
static const float *masked(const mote_t *m, const mote_op_t *op, const parts_t *p)
{
    const int8_t *y = mote_read(m, op->out);
    float *dy = mote_write(m, op->dout);
    for (uint32_t i = mote_size(p->out); i-- > 0;) {
        if (y[i] <= p->range.low || y[i] >= p->range.high) {
            dy[i] = 0.0f;
        }
    }
    return dy;
}

static void learn_biases(mote_t *m, const mote_op_t *op, const parts_t *p, const float *dy)
{
    const uint32_t size = mote_size(p->out), channels = p->out->c;
    for (uint32_t o = 0; p->db != NULL && o < op->trained; o++) {
        float sum = 0.0f;
        for (uint32_t i = o; i < size; i += channels) {
            sum += dy[i];
        }
        int64_t to = (int64_t)p->b[o] + rounded_at_random(m, m->step / (p->in->scale * p->scales[o]) * sum);
        p->db[o] = (int32_t)(to < -INT32_MAX ? -INT32_MAX : to > INT32_MAX ? INT32_MAX : to);
    }
}

/* to[i] += d * w[i] */
static void add_scaled(float *to, float d, const int8_t *w, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        to[i] += d * (float)w[i];
    }
}

void mote_trained_int8_dense_back(mote_t *m, const mote_op_t *op)
{
    const parts_t p = parts_of(m, op, mote_size(mote_tensor(m, op->in)));
    const int8_t *x = mote_read(m, op->in);
    const float *dy = masked(m, op, &p);
    float *din = mote_begun_din(m, op);
    for (uint32_t o = 0; din != NULL && o < p.out->c; o++) {
        add_scaled(din, dy[o] * p.scales[o], filter_of(&p, o).w, p.taps);
    }
    for (uint32_t o = 0; p.dw != NULL && o < p.split; o++) {
        const float step = weight_step(m, &p, o) * dy[o];
        int8_t *w = p.dw + o * p.taps;
        for (uint32_t i = 0; i < p.taps; i++) {
            w[i] = moved_weight(m, w[i], step * (float)(x[i] - p.in->zero_point));
        }
    }
    learn_biases(m, op, &p, dy);
}

/* Where a tap of the window of output (i, j) lies: the place's number, or -1 if it is outside of the input. */
static int32_t place_of(const mote_op_t *op, const mote_tensor_t *in, uint32_t i, uint32_t j, uint32_t row,
                        uint32_t column)
{
    int32_t y = (int32_t)(i * op->stride_h + row * op->dilation_h) - op->pad_top;
    int32_t x = (int32_t)(j * op->stride_w + column * op->dilation_w) - op->pad_left;
    return y >= 0 && y < in->h && x >= 0 && x < in->w ? y * in->w + x : -1;
}

/* din += what the outputs at (i, j), whose gradients are dy, give. */
static void conv2d_din(const mote_op_t *op, const parts_t *p, const float *dy, uint32_t i, uint32_t j, float *din)
{
    const uint32_t depth = p->in->c;
    for (uint32_t o = 0; o < p->out->c; o++) {
        const float d = dy[o] * p->scales[o];
        const int8_t *w = filter_of(p, o).w;
        for (uint32_t row = 0; d != 0.0f && row < op->kernel_h; row++) {
            for (uint32_t column = 0; column < op->kernel_w; column++, w += depth) {
                int32_t place = place_of(op, p->in, i, j, row, column);
                if (place >= 0) {
                    add_scaled(din + (uint32_t)place * depth, d, w, depth);
                }
            }
        }
    }
}

/* sums[c] = the sum over all outputs of one channel (dy is the first) of dy * (x - zero point), x the input at tap
 * (row, column) of the output's window, channel c; x is the first of `count` channels. */
static void conv2d_sums(const mote_op_t *op, const parts_t *p, const float *dy, const int8_t *x, uint32_t row,
                        uint32_t column, uint32_t count, float *sums)
{
    memset(sums, 0, count * sizeof *sums);
    for (uint32_t i = 0; i < p->out->h; i++) {
        for (uint32_t j = 0; j < p->out->w; j++, dy += p->out->c) {
            int32_t place = *dy != 0.0f ? place_of(op, p->in, i, j, row, column) : -1;
            for (uint32_t c = 0; place >= 0 && c < count; c++) {
                sums[c] += *dy * (float)(x[(uint32_t)place * p->in->c + c] - p->in->zero_point);
            }
        }
    }
}

/* The weights of one tap of output channel o. */
static void conv2d_learn(mote_t *m, const mote_op_t *op, const parts_t *p, const float *dy, uint32_t o, uint32_t tap)
{
    const uint32_t depth = p->in->c;
    const int8_t *x = mote_read(m, op->in);
    const float step = weight_step(m, p, o);
    int8_t *w = p->dw + o * p->taps + tap * depth;
    float sums[CHUNK];
    for (uint32_t c = 0; c < depth; c += CHUNK) {
        const uint32_t count = depth - c < CHUNK ? depth - c : CHUNK;
        conv2d_sums(op, p, dy + o, x + c, tap / op->kernel_w, tap % op->kernel_w, count, sums);
        for (uint32_t k = 0; k < count; k++) {
            w[c + k] = moved_weight(m, w[c + k], step * sums[k]);
        }
    }
}

void mote_trained_int8_conv2d_back(mote_t *m, const mote_op_t *op)
{
    const parts_t p = parts_of(m, op, filter_taps(m, op));
    const float *dy = masked(m, op, &p), *at = dy;
    float *din = mote_begun_din(m, op);
    for (uint32_t i = 0; din != NULL && i < p.out->h; i++) {
        for (uint32_t j = 0; j < p.out->w; j++, at += p.out->c) {
            conv2d_din(op, &p, at, i, j, din);
        }
    }
    for (uint32_t o = 0; p.dw != NULL && o < p.split; o++) {
        for (uint32_t tap = 0; tap < (uint32_t)op->kernel_h * op->kernel_w; tap++) {
            conv2d_learn(m, op, &p, dy, o, tap);
        }
    }
    learn_biases(m, op, &p, dy);
}

/* din += what the outputs at (i, j), whose gradients are dy, give. */
static void depthwise_din(const mote_op_t *op, const parts_t *p, const float *dy, uint32_t i, uint32_t j, float *din)
{
    const uint32_t depth = p->in->c, multiple = p->out->c / depth;
    for (uint32_t o = 0; o < p->out->c; o++) {
        const filter_t f = depthwise_filter_of(p, o);
        for (uint32_t tap = 0; dy[o] != 0.0f && tap < p->taps; tap++) {
            int32_t place = place_of(op, p->in, i, j, tap / op->kernel_w, tap % op->kernel_w);
            if (place >= 0) {
                din[(uint32_t)place * depth + o / multiple] += dy[o] * p->scales[o] * (float)f.w[tap * f.row];
            }
        }
    }
}

void mote_trained_int8_depthwise_back(mote_t *m, const mote_op_t *op)
{
    const parts_t p = parts_of(m, op, (uint32_t)op->kernel_h * op->kernel_w);
    const int8_t *x = mote_read(m, op->in);
    const float *dy = masked(m, op, &p), *at = dy;
    float *din = mote_begun_din(m, op);
    for (uint32_t i = 0; din != NULL && i < p.out->h; i++) {
        for (uint32_t j = 0; j < p.out->w; j++, at += p.out->c) {
            depthwise_din(op, &p, at, i, j, din);
        }
    }
    const uint32_t multiple = p.out->c / p.in->c;
    for (uint32_t tap = 0; p.dw != NULL && tap < p.taps; tap++) {
        for (uint32_t o = 0; o < p.split; o++) {
            int8_t *w = p.dw + tap * p.split + o;
            float sum;
            conv2d_sums(op, &p, dy + o, x + o / multiple, tap / op->kernel_w, tap % op->kernel_w, 1, &sum);
            *w = moved_weight(m, *w, weight_step(m, &p, o) * sum);
        }
    }
    learn_biases(m, op, &p, dy);
}
