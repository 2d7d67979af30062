/* Atomic access to the control page, which any number of processes may have mapped. */
#include "table.h"

#include "numerics.h"

_Static_assert(offsetof(he_control, step) == 16 && offsetof(he_control, lr) == 32 &&
                   offsetof(he_control, clean) == 48 && offsetof(he_control, saving) == 64 &&
                   offsetof(he_control, gate_closing) == 88,
               "the control page is a file format");

static double load_double(const double *p) { return he_double(__atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE)); }

double he_decay_total(const he_control *c) { return load_double(&c->decay_total); }

/* Adds this step's log(1 - lr * weight_decay) to the decay total; returns the new total. */
static double decay_total_add(he_control *c, double amount) {
    uint64_t *p = (uint64_t *)&c->decay_total;
    uint64_t seen = __atomic_load_n(p, __ATOMIC_ACQUIRE), next;
    do next = he_bits64(he_double(seen) + amount);
    while (!__atomic_compare_exchange_n(p, &seen, next, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    return he_double(next);
}

void he_step_begin(he_control *c, double weight_decay, he_step *out) {
    double lr = load_double(&c->lr);
    out->lr = (float)lr;
    out->step = __atomic_add_fetch(&c->step, 1, __ATOMIC_ACQ_REL);
    out->decay_total = weight_decay > 0.0 ? decay_total_add(c, he_log1p(-(lr * weight_decay))) : 0.0;
}

void he_rows_touched_add(he_control *c, uint64_t n) { __atomic_add_fetch(&c->rows_touched, n, __ATOMIC_ACQ_REL); }
