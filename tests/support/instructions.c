/* Intel's AMX and AVX-VNNI on a processor that has none: each instruction raises SIGILL, and the handler does what the
   manual says, but for the order of sums and denormal numbers. What would raise an exception ends the process.

   Those that tinyvit's kernels use: LDTILECFG, TILERELEASE, TILELOADD, TILESTORED, TDPBF16PS, TDPBUSD; VPDPBUSD of 256
   bits in registers. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef union { uint8_t bytes[64]; uint16_t halves[32]; int32_t whole[16]; float real[16]; } row_t;

static _Thread_local struct { uint8_t palette, start_row, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
static _Thread_local row_t tiles[8][16];
long instructions; /* that were carried out */
static const int registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void check(int fits, const char *what) {
    if (fits) return;
    fprintf(stderr, "instructions.c: %s\n", what);
    abort();
}

static float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static void products(int c, int a, int b, int of_bytes) {
    check(c != a && c != b && a != b, "a tile is used twice in a product");
    check(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b] &&
          config.row_bytes[a] == 4 * config.rows[b], "the shapes of tiles do not agree");
    for (int i = 0; i < config.rows[c]; i++)
        for (int k = 0; k < config.row_bytes[a] / 4; k++)
            for (int j = 0; j < config.row_bytes[c] / 4; j++)
                if (of_bytes)
                    for (int n = 0; n < 4; n++)
                        tiles[c][i].whole[j] += (int)tiles[a][i].bytes[4 * k + n] * (int8_t)tiles[b][k].bytes[4 * j + n];
                else
                    for (int n = 0; n < 2; n++)
                        tiles[c][i].real[j] += widened(tiles[a][i].halves[2 * k + n]) * widened(tiles[b][k].halves[2 * j + n]);
}

static void configure(const uint8_t *memory) {
    memset(tiles, 0, sizeof tiles);
    memcpy(&config, memory, 64);
    check(config.palette == 1 && config.start_row == 0, "expected the palette 1 from row 0");
    for (int i = 0; i < 14; i++) check(config.reserved[i] == 0, "a reserved byte is not zero");
    for (int i = 0; i < 16; i++)
        check(i < 8 ? config.rows[i] <= 16 && config.row_bytes[i] <= 64 : config.rows[i] + config.row_bytes[i] == 0,
              "a tile is too large, or there are more than 8");
}

static void add_products_of_bytes(uint8_t *state, int sums, int a, int b) {
    state[512] |= 4; /* the upper halves of the registers count */
    for (int j = 0; j < 32; j++) {
        int half = j < 16 ? 160 : 576, place = j % 16; /* where XSAVE puts the lower and the upper ones */
        int product = state[half + 16 * a + place] * (int8_t)state[half + 16 * b + place], sum;
        uint8_t *at = state + half + 16 * sums + place / 4 * 4;
        memcpy(&sum, at, 4);
        sum += product;
        memcpy(at, &sum, 4);
    }
}

static void on_illegal(int number, siginfo_t *info, void *context) {
    greg_t *general = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)general[REG_RIP], *code = at;
    check(at[0] == 0xC4 && (at[1] & 0x1F) == 2, "expected VEX of three bytes and the map 0F38");
    int prefix = at[2] & 3, second = ~at[2] >> 3 & 15, opcode = at[3], form = at[4];
    int high_reg = at[1] & 0x80 ? 0 : 8, high_index = at[1] & 0x40 ? 0 : 8, high_base = at[1] & 0x20 ? 0 : 8;
    int mode = form >> 6, reg = (form >> 3 & 7) | high_reg, rm = form & 7;
    code = at + 5;
    uint8_t *address = 0;
    int64_t stride = 0;
    if (mode != 3) {
        int base = rm | high_base;
        if (rm == 4) { /* a byte with scale, index and base */
            int index = (*code >> 3 & 7) | high_index;
            base = (*code & 7) | high_base;
            if (index != 4) stride = general[registers[index]] << (*code >> 6);
            check(mode || (base & 7) != 5, "an address without a base");
            code++;
        } else
            check(mode || rm != 5, "an address relative to the instruction");
        address = (uint8_t *)general[registers[base]];
        if (mode == 1) address += *(const int8_t *)code, code += 1;
        if (mode == 2) address += *(const int32_t *)code, code += 4;
    }
    check(config.palette || opcode == 0x49 || opcode == 0x50, "no tiles are configured");
    if (opcode == 0x50 && prefix == 1 && mode == 3 && at[2] & 4) /* VPDPBUSD */
        add_products_of_bytes((uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs, reg, second, rm | high_base);
    else if (opcode == 0x49 && prefix == 0 && mode == 3) memset(&config, 0, sizeof config); /* TILERELEASE */
    else if (opcode == 0x49 && prefix == 0) configure(address); /* LDTILECFG */
    else if (opcode == 0x4B && (prefix == 3 || prefix == 2)) /* TILELOADD, TILESTORED */
        for (int i = 0; i < config.rows[reg]; i++, address += stride)
            if (prefix == 3) memcpy(&tiles[reg][i], address, config.row_bytes[reg]);
            else memcpy(address, &tiles[reg][i], config.row_bytes[reg]);
    else if (opcode == 0x5C && prefix == 2) products(reg, rm, second, 0); /* TDPBF16PS */
    else if (opcode == 0x5E && prefix == 1) products(reg, rm, second, 1); /* TDPBUSD */
    else check(0, "an instruction that it does not know");
    general[REG_RIP] += code - at;
    instructions++;
}

void install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
}
