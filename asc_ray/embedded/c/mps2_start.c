/* Starts a Cortex-M4 of QEMU's machine mps2-an386, or a Cortex-M3 of mps2-an385, and counts instructions and stack there.
 *
 * With `-icount shift=0` an instruction takes 1 ns of the machine's time, and its timer counts at 25 MHz.
 */
#include <stdint.h>
#include <stdlib.h>

#include "mps2_measure.h"

#define NS_A_TICK 40
#define TIMER ((volatile uint32_t *)0x40000000) /* control, value, reload; it counts downwards */
#define CPACR (*(volatile uint32_t *)0xE000ED88)
#define PAINTED 8192 /* bytes of stack that are watched */
#define PAINT 0xA5A5A5A5u

extern uint32_t asc_bss_start[], asc_bss_end[], asc_stack_top[];
extern void initialise_monitor_handles(void);
extern int main(int argc, char **argv);

static uint32_t asc_instructions(void)
{
    return (0xFFFFFFFF - TIMER[1]) * NS_A_TICK;
}

/* Paint the stack below `top`, the caller's own frame. */
static void asc_paint(volatile uint32_t *top)
{
    for (int n = 1; n <= PAINTED / 4; n++)
        top[-n] = PAINT;
}

/* Return how many bytes below `top` are no longer painted. */
static uint32_t asc_used(volatile uint32_t *top)
{
    int n = PAINTED / 4;
    while (n > 0 && top[-n] == PAINT)
        n--;
    return 4 * (uint32_t)n;
}

asc_cost asc_measured(const int16_t *samples, float *logits)
{
    asc_cost cost;
    volatile uint32_t *top;
    __asm volatile("mov %0, sp" : "=r"(top));
    asc_paint(top);
    TIMER[2] = 0xFFFFFFFF;
    TIMER[1] = 0xFFFFFFFF;
    TIMER[0] = 1;
    asc_listen(samples);
    cost.front_end = asc_instructions();
    asc_name(logits);
    cost.network = asc_instructions() - cost.front_end;
    cost.stack = asc_used(top);
    return cost;
}

static void asc_reset(void)
{
    CPACR |= 0xF << 20; /* the FPU */
    __asm volatile("dsb\n\tisb");
    for (uint32_t *word = asc_bss_start; word < asc_bss_end; word++)
        *word = 0;
    initialise_monitor_handles();
    exit(main(0, 0));
}

static void asc_fault(void)
{
    abort();
}

__attribute__((section(".vectors"), used)) static void *const asc_vectors[16] = {
    asc_stack_top, (void *)asc_reset, (void *)asc_fault, (void *)asc_fault, (void *)asc_fault, (void *)asc_fault,
    (void *)asc_fault,
};
