// ROUGE-L of many pairs of texts: words of a-z and 0-9, then their longest common subsequence by bits (Hyyrö 2004).
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace esrl {

struct Text {
    const char* at;
    int64_t size;
};

// What a character is in a word: a-z and 0-9 are themselves, A-Z their lower case, all others 0.
struct Letters {
    uint8_t of[256] = {};
    constexpr Letters() {
        for (int c = '0'; c <= '9'; c++) of[c] = c;
        for (int c = 'a'; c <= 'z'; c++) of[c] = c, of[c - 'a' + 'A'] = c;
    }
};
static constexpr Letters LETTERS;

// f(word, hash) for each word of a text.
template <class F>
static inline void each_word(Text text, F f) {
    const char *at = text.at, *end = text.at + text.size;
    while (at < end) {
        const char* begin = at;
        uint64_t hash = 0;
        for (uint8_t letter; at < end && (letter = LETTERS.of[uint8_t(*at)]); at++)
            hash = (hash ^ letter) * 0x9E3779B97F4A7C15ull;
        if (at > begin) f(Text{begin, at - begin}, hash ^ hash >> 32);
        else at++;
    }
}

static inline bool same_word(Text a, Text b) {
    if (a.size != b.size) return false;
    for (int64_t i = 0; i < a.size; i++)
        if (LETTERS.of[uint8_t(a.at[i])] != LETTERS.of[uint8_t(b.at[i])]) return false;
    return true;
}

// The words of a reference, each with the bits of its positions.
struct Reference {
    struct Slot {
        Text word;
        uint64_t hash;
        int64_t bits;  // where they begin, or -1 where there is no word
    };
    Text text{nullptr, -1};
    std::vector<Slot> slots;  // a hash table, its size a power of two
    std::vector<uint64_t> bits;
    std::vector<std::pair<Text, uint64_t>> words;
    int64_t blocks = 0;  // of 64 positions

    void read(Text from) {
        text = from;
        words.clear();
        each_word(from, [&](Text word, uint64_t hash) { words.emplace_back(word, hash); });
        blocks = (int64_t(words.size()) + 63) / 64;
        size_t size = 8;
        while (size < 2 * words.size()) size *= 2;
        slots.assign(size, {{nullptr, 0}, 0, -1});
        bits.clear();
        for (size_t i = 0; i < words.size(); i++) {
            Slot& slot = find(words[i].first, words[i].second);
            if (slot.bits < 0) {
                slot = {words[i].first, words[i].second, int64_t(bits.size())};
                bits.resize(bits.size() + blocks);
            }
            bits[slot.bits + i / 64] |= uint64_t(1) << i % 64;
        }
    }

    Slot& find(Text word, uint64_t hash) {
        for (size_t i = hash & (slots.size() - 1);; i = (i + 1) & (slots.size() - 1)) {
            if (slots[i].bits < 0) return slots[i];
            if (slots[i].hash == hash && same_word(slots[i].word, word)) return slots[i];
        }
    }
};

// F-measure of a completion. `row`: bit i is 0 where the subsequence grows with the reference's word i.
static double rouge_l(Text completion, Reference& reference, std::vector<uint64_t>& row) {
    int64_t count = 0, matches = 0;
    row.assign(reference.blocks, ~uint64_t(0));
    each_word(completion, [&](Text word, uint64_t hash) {
        count++;
        const int64_t at = reference.find(word, hash).bits;
        if (at < 0) return;
        uint64_t carry = 0;
        for (int64_t b = 0; b < reference.blocks; b++) {
            const uint64_t matched = row[b] & reference.bits[at + b], half = row[b] + carry, sum = half + matched;
            carry = (half < carry) | (sum < half);
            row[b] = sum | (row[b] & ~matched);
        }
    });
    // behind the last word nothing matches: those bits stay 1
    for (const uint64_t bits : row) matches += __builtin_popcountll(~bits);
    return matches ? 2.0 * matches / (int64_t(reference.words.size()) + count) : 0.0;
}

// Texts that stand one behind the other, each followed by a 0.
static void rouge_l(const char* completions, const char* references, int64_t pairs, double* scores) {
    Reference reference;
    std::vector<uint64_t> row;
    for (int64_t i = 0; i < pairs; i++) {
        const Text own{completions, int64_t(std::strlen(completions))}, wanted{references, int64_t(std::strlen(references))};
        completions += own.size + 1;
        references += wanted.size + 1;
        const Text& last = reference.text;  // rows of one prompt stand together
        if (last.size != wanted.size || std::memcmp(last.at, wanted.at, wanted.size)) reference.read(wanted);
        scores[i] = rouge_l(own, reference, row);
    }
}

}  // namespace esrl
