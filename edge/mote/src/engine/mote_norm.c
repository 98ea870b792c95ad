/* Layer normalisation over the channels of every place, float32 (Ba, Kiros and Hinton 2016). */
#include "mote_kernel_list.h"
#include "mote_window.h"

static const float *epsilon_of(const mote_t *m, const mote_op_t *op)
{
    return (const float *)(const void *)(mote_constants(m) + op->constants);
}

int mote_layernorm_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    return mote_floats(m, op) && in->c == out->c && mote_size(in) == mote_size(out) &&
           mote_weights_fit(m, op, in->c, in->c, sizeof(float)) && *epsilon_of(m, op) >= 0.0f &&
           mote_finite(*epsilon_of(m, op));
}

/* Of one place: the mean, and one over the standard deviation. */
typedef struct {
    float mean, scale;
} moments_t;

static moments_t moments(const float *x, uint32_t c, float epsilon)
{
    float sum = 0.0f, squares = 0.0f, share = 1.0f / (float)c;
    for (uint32_t j = 0; j < c; j++) {
        sum += x[j];
    }
    moments_t s = {sum * share, 0.0f};
    for (uint32_t j = 0; j < c; j++) {
        float d = x[j] - s.mean;
        squares += d * d;
    }
    s.scale = 1.0f / mote_sqrtf(squares * share + epsilon);
    return s;
}

void mote_layernorm(const mote_t *m, const mote_op_t *op)
{
    uint32_t c = mote_tensor(m, op->in)->c, places = mote_size(mote_tensor(m, op->in)) / c;
    mote_weights_t p = mote_weights(m, op, c, sizeof(float));
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (; places > 0; places--, x += c, y += c) {
        moments_t s = moments(x, c, *epsilon_of(m, op));
        for (uint32_t j = 0; j < c; j++) {
            y[j] = p.w[j] * ((x[j] - s.mean) * s.scale) + p.b[j];
        }
    }
}

/* With g = gamma dy and n the normalised input: dx = scale (g - mean of g - n mean of g n), of one place. */
static void back(const float *x, const float *dy, const float *gamma, float *dx, uint32_t c, moments_t s, int adds)
{
    float sum = 0.0f, along = 0.0f, share = 1.0f / (float)c;
    for (uint32_t j = 0; j < c; j++) {
        float g = gamma[j] * dy[j];
        sum += g;
        along += g * ((x[j] - s.mean) * s.scale);
    }
    sum *= share;
    along *= share;
    for (uint32_t j = 0; j < c; j++) {
        float d = s.scale * (gamma[j] * dy[j] - sum - (x[j] - s.mean) * s.scale * along);
        dx[j] = adds ? dx[j] + d : d;
    }
}

/* All of the input's gradient comes first: gamma and beta are used at every place. */
void mote_layernorm_back(mote_t *m, const mote_op_t *op)
{
    uint32_t c = mote_tensor(m, op->in)->c, size = mote_size(mote_tensor(m, op->in));
    mote_weights_t p = mote_weights(m, op, c, sizeof(float));
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout), epsilon = *epsilon_of(m, op);
    float *dx = mote_din(m, op);
    for (uint32_t at = 0; dx != NULL && at < size; at += c) {
        back(x + at, dy + at, p.w, dx + at, c, moments(x + at, c, epsilon), op->flags & MOTE_ADDS_DIN);
    }
    for (uint32_t at = 0; p.dw != NULL && at < size; at += c) {
        moments_t s = moments(x + at, c, epsilon);
        for (uint32_t j = 0; j < c; j++) {
            p.dw[j] += m->step * dy[at + j] * ((x[at + j] - s.mean) * s.scale);
        }
    }
    for (uint32_t at = 0; p.db != NULL && at < size; at += c) {
        for (uint32_t j = 0; j < c; j++) {
            p.db[j] += m->step * dy[at + j];
        }
    }
}

/* Channel by channel, as there is no memory for a gradient: each looks at every place's moments again. */
float mote_layernorm_norm(const mote_t *m, const mote_op_t *op)
{
    uint32_t c = mote_tensor(m, op->in)->c, size = mote_size(mote_tensor(m, op->in));
    mote_weights_t p = mote_weights(m, op, c, sizeof(float));
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float norm = 0.0f;
    for (uint32_t j = 0; j < c; j++) {
        float gamma = 0.0f, beta = 0.0f;
        for (uint32_t at = 0; at < size; at += c) {
            beta += dy[at + j];
            if (p.dw != NULL) {
                moments_t s = moments(x + at, c, *epsilon_of(m, op));
                gamma += dy[at + j] * ((x[at + j] - s.mean) * s.scale);
            }
        }
        norm += gamma * gamma + beta * beta;
    }
    return norm;
}
