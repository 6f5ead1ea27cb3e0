/* Names the scene of each clip in a file of raw 16-bit samples, on a computer or, through semihosting, on an emulator. */
#include <stdio.h>
#include <string.h>

#include "asc_model.h"

#ifdef ASC_MPS2
#include "mps2_measure.h"
#endif

static int16_t samples[ASC_SAMPLES];

int main(int argc, char **argv)
{
    FILE *file = fopen(argc > 1 ? argv[1] : "samples.raw", "rb");
    float logits[ASC_LABELS];

    if (!file) {
        fprintf(stderr, "usage: asc SAMPLES.RAW (%d Hz, mono, signed 16-bit, little-endian)\n", ASC_SAMPLE_RATE);
        return 2;
    }
    while (fread(samples, sizeof samples[0], ASC_SAMPLES, file) == ASC_SAMPLES) {
        int best = 0;
#ifdef ASC_MPS2
        asc_cost cost = asc_measured(samples, logits);
        printf("%lu %lu %lu ", (unsigned long)cost.front_end, (unsigned long)cost.network, (unsigned long)cost.stack);
#else
        asc_scores(samples, logits);
#endif
        for (int c = 1; c < ASC_LABELS; c++)
            best = logits[c] > logits[best] ? c : best;
        printf("%d", best);
        for (int c = 0; c < ASC_LABELS; c++) {
            uint32_t bits;
            memcpy(&bits, &logits[c], sizeof bits);
            printf(" %08lx", (unsigned long)bits);
        }
        printf(" %s\n", asc_labels[best]);
    }
    fclose(file);
    return 0;
}
