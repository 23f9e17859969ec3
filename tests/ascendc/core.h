// The memories of one vector core and who touched which byte of them when.
//
// A core is four pipes that run on their own: scalar (S), vector (V), copies in (MTE2) and out
// (MTE3). The shim runs everything in the order of the program, and keeps for each pipe a count of
// what it was given and of what it may rely on from the others. An access to a byte that another
// operation wrote, and that the pipe cannot rely on to be done, is an error, even though the result
// is right here: vector clocks, as race detectors have them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace shim {

enum Pipe : uint8_t { S, V, MTE2, MTE3, PIPES };

// Prints a line and aborts.
[[noreturn]] void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

using Clock = std::array<uint32_t, PIPES>;

struct Byte {
    uint32_t wrote = 0;
    Clock read{};
    Pipe writer = S;
    bool known = false;      // somebody wrote it; all others are poison
    int16_t writing = -1;    // the block that wrote it in this launch
    int16_t reading = -1;    // a block that read it in this launch
    bool shared = false;     // more than one did
};

struct Memory {
    const char* name;
    uint8_t* data;
    uint64_t size;
    std::vector<Byte> bytes;
    void Poison(uint64_t at, uint64_t n);
};

struct Core {
    int16_t block;
    uint32_t used = 0;                                // bytes of the Unified Buffer
    Clock now{};                                      // operations that each pipe was given
    std::array<Clock, PIPES> seen{};                  // what each pipe may rely on to be done
    std::map<std::pair<int, int>, Clock> flags;       // set and not waited for
    Clock Snapshot(Pipe pipe) const;
    void Wait(Pipe pipe, const Clock& done);
};

extern Core* core;      // the one that runs
extern Memory ub;       // its Unified Buffer
extern uint32_t blocks; // of this launch

// One instruction; names its bytes as it touches them.
class Op {
public:
    Op(Pipe pipe, const char* name);
    const uint8_t* Read(Memory& memory, uint64_t at, uint64_t n);
    uint8_t* Write(Memory& memory, uint64_t at, uint64_t n);
    const char* name;

private:
    void Check(const Memory& memory, uint64_t at, uint64_t n) const;
    Pipe pipe_;
    uint32_t time_;
};

// Memory of the device that holds `size` bytes from `at` on; fails where there is none.
Memory& Find(const void* at, uint64_t size);

// Checks what has to be in order at the end of a block.
void Finish();

template <typename F>
void Launch(uint32_t count, F kernel)
{
    extern void Begin(uint32_t);
    Begin(count);
    for (uint32_t i = 0; i < count; ++i) {
        Core one{};
        one.block = static_cast<int16_t>(i);
        core = &one;
        kernel();
        Finish();
    }
    core = nullptr;
}

}  // namespace shim
