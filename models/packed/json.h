/* Read JSON, for program.h: the header of a safetensors file and the description in it. Nothing
 * behind `end` is read. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct cursor {
    const char *at, *end;
};

static void skip_space(struct cursor *c) {
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\n' || *c->at == '\t' || *c->at == '\r')) c->at++;
}

static int take(struct cursor *c, char symbol) {
    skip_space(c);
    if (c->at == c->end || *c->at != symbol) return 0;
    c->at++;
    return 1;
}

static int32_t take_hex(struct cursor *c) {
    int32_t number = 0;
    if (c->end - c->at < 4) return -1;
    for (int i = 0; i < 4; i++, c->at++) {
        const char *digits = "0123456789abcdef", symbol = *c->at >= 'A' && *c->at <= 'F' ? (char)(*c->at + 32) : *c->at;
        const char *digit = symbol ? strchr(digits, symbol) : 0;
        if (!digit) return -1;
        number = 16 * number + (int32_t)(digit - digits);
    }
    return number;
}

/* A character behind a backslash, as UTF-8; returns its length, or 0. */
static int take_escape(struct cursor *c, char bytes[4]) {
    static const char *symbols = "\"\\/bfnrt", *values = "\"\\/\b\f\n\r\t";
    const char symbol = c->at < c->end ? *c->at++ : 0, *found = symbol ? strchr(symbols, symbol) : 0;
    if (found) {
        bytes[0] = values[found - symbols];
        return 1;
    }
    int32_t point = symbol == 'u' ? take_hex(c) : -1;
    if (point >= 0xd800 && point < 0xdc00) { /* the first half of a pair */
        if (c->end - c->at < 2 || c->at[0] != '\\' || c->at[1] != 'u') return 0;
        c->at += 2;
        const int32_t second = take_hex(c);
        if (second < 0xdc00 || second > 0xdfff) return 0;
        point = 0x10000 + ((point - 0xd800) << 10) + (second - 0xdc00);
    }
    if (point <= 0) return 0;
    const int length = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, point >>= 6) bytes[i] = (char)(0x80 | (point & 0x3f));
    bytes[0] = (char)(length == 1 ? point : (0xf00 >> length & 0xf0) | point);
    return length;
}

/* A string; `text` gets as many of its characters as fit into `size`. Returns the size of all of
 * it, or 0 if it is damaged. */
static size_t take_string(struct cursor *c, char *text, size_t size) {
    size_t length = 0, written = 0;
    if (!take(c, '"')) return 0;
    while (c->at < c->end && *c->at != '"') {
        char bytes[4] = {*c->at++};
        const int num = bytes[0] == '\\' ? take_escape(c, bytes) : 1;
        if (!num) return 0;
        if (written == length && length + (size_t)num < size) {
            memcpy(text + length, bytes, (size_t)num);
            written += (size_t)num;
        }
        length += (size_t)num;
    }
    if (size) text[written] = 0;
    return take(c, '"') ? length + 1 : 0;
}

/* A key of an object and its colon. */
static int take_key(struct cursor *c, char *text, size_t size) {
    const size_t needed = take_string(c, text, size);
    return needed && needed <= size && take(c, ':');
}

static int64_t take_number(struct cursor *c) {
    int64_t number = 0;
    skip_space(c);
    if (c->at == c->end || *c->at < '0' || *c->at > '9') return -1;
    for (; c->at < c->end && *c->at >= '0' && *c->at <= '9'; c->at++) {
        number = 10 * number + (*c->at - '0');
        if (number > (int64_t)1 << 40) return -1;
    }
    return number;
}

static int take_numbers(struct cursor *c, int64_t *numbers, int most) {
    int count = 0;
    if (!take(c, '[')) return -1;
    if (take(c, ']')) return 0;
    do {
        const int64_t number = take_number(c);
        if (count == most || number < 0) return -1;
        numbers[count++] = number;
    } while (take(c, ','));
    return take(c, ']') ? count : -1;
}

/* A value of any type: words and strings up to the bracket that closes the first. */
static int skip_value(struct cursor *c) {
    int64_t depth = 0;
    do {
        skip_space(c);
        if (c->at == c->end) return 0;
        const char symbol = *c->at;
        if (symbol == '"') {
            if (!take_string(c, 0, 0)) return 0;
        } else if (symbol == '[' || symbol == '{') {
            depth++, c->at++;
        } else if (memchr("]},:", symbol, 4)) {
            if (depth == 0) return 0;
            depth -= symbol == ']' || symbol == '}';
            c->at++;
        } else {
            while (c->at < c->end && !memchr(" \n\t\r\"[]{},:", *c->at, 11)) c->at++;
        }
    } while (depth > 0);
    return 1;
}

/* The value of a key of the description; nothing if there is none. */
static struct cursor find(const char *description, const char *name) {
    struct cursor c = {description, description + strlen(description)};
    char key[16];
    if (!take(&c, '{')) return (struct cursor){0, 0};
    do {
        const size_t size = take_string(&c, key, sizeof key);
        if (!size || !take(&c, ':')) break;
        if (size <= sizeof key && !strcmp(key, name)) return c;
        if (!skip_value(&c)) break;
    } while (take(&c, ','));
    return (struct cursor){0, 0};
}
