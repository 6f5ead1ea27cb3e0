#ifndef MPS2_MEASURE_H
#define MPS2_MEASURE_H

#include "asc_model.h"

/* Instructions of the two halves, and bytes of stack below the caller's. */
typedef struct {
    uint32_t front_end, network, stack;
} asc_cost;

/* asc_scores, measured. */
asc_cost asc_measured(const int16_t *samples, float *logits);

#endif
