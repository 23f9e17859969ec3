#include "core.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>

namespace shim {

#if __NPU_ARCH__ == 2201
constexpr uint64_t UB_BYTES = (192 - 8) * 1024 - 256;  // 8 KiB are the compiler's, 256 bytes too
#elif __NPU_ARCH__ == 3510
constexpr uint64_t UB_BYTES = 248 * 1024;
#elif __NPU_ARCH__ == 2002
constexpr uint64_t UB_BYTES = (256 - 8) * 1024;
#else
#error "the shim knows dav-2002, dav-2201 and dav-3510"
#endif

static uint8_t ub_data[UB_BYTES] __attribute__((aligned(512)));
Memory ub{"the Unified Buffer", ub_data, UB_BYTES, std::vector<Byte>(UB_BYTES)};
Core* core = nullptr;
uint32_t blocks = 0;
static std::list<Memory> global;  // by reference, so it must not move
static const char* const PIPE_NAMES[] = {"S", "V", "MTE2", "MTE3"};

void Fail(const char* format, ...)
{
    va_list args;
    va_start(args, format);
    std::fprintf(stderr, "shim: ");
    std::vfprintf(stderr, format, args);
    std::fprintf(stderr, "\n");
    va_end(args);
    std::fflush(stderr);
    std::abort();
}

void Memory::Poison(uint64_t at, uint64_t n)
{
    std::memset(data + at, 0xA5, n);
    for (uint64_t i = at; i < at + n; ++i) {
        bytes[i].known = false;
    }
}

Clock Core::Snapshot(Pipe pipe) const
{
    Clock done = seen[pipe];
    done[pipe] = now[pipe];
    return done;
}

void Core::Wait(Pipe pipe, const Clock& done)
{
    for (int p = 0; p < PIPES; ++p) {
        seen[pipe][p] = std::max(seen[pipe][p], done[p]);
    }
}

Op::Op(Pipe pipe, const char* name) : name(name), pipe_(pipe), time_(++core->now[pipe])
{
    core->seen[S][S] = core->now[S];  // the scalar pipe is in order
}

void Op::Check(const Memory& memory, uint64_t at, uint64_t n) const
{
    if (at > memory.size || n > memory.size - at) {
        Fail("%s touches bytes %llu to %llu of %s, which has %llu", name, (unsigned long long)at,
             (unsigned long long)(at + n), memory.name, (unsigned long long)memory.size);
    }
}

const uint8_t* Op::Read(Memory& memory, uint64_t at, uint64_t n)
{
    Check(memory, at, n);
    const Clock& seen = core->seen[pipe_];
    for (uint64_t i = at; i < at + n; ++i) {
        Byte& b = memory.bytes[i];
        if (!b.known) {
            Fail("%s reads byte %llu of %s, which nobody wrote", name, (unsigned long long)i, memory.name);
        }
        bool ours = &memory == &ub || b.writing == core->block;
        if (b.writing >= 0 && !ours) {
            Fail("%s of block %d reads what block %d wrote", name, core->block, b.writing);
        }
        if (ours && b.wrote > seen[b.writer]) {
            if (b.writer == pipe_ && b.wrote == time_) {
                Fail("%s reads what it writes: operands overlap in part", name);
            }
            Fail("%s on pipe %s reads byte %llu of %s while pipe %s may still write it", name,
                 PIPE_NAMES[pipe_], (unsigned long long)i, memory.name, PIPE_NAMES[b.writer]);
        }
        b.read[pipe_] = time_;
        b.shared = b.shared || (b.reading >= 0 && b.reading != core->block);
        b.reading = core->block;
    }
    return memory.data + at;
}

uint8_t* Op::Write(Memory& memory, uint64_t at, uint64_t n)
{
    Check(memory, at, n);
    const Clock& seen = core->seen[pipe_];
    for (uint64_t i = at; i < at + n; ++i) {
        Byte& b = memory.bytes[i];
        if (&memory != &ub) {
            bool others = b.shared || (b.reading >= 0 && b.reading != core->block);
            if (others || (b.writing >= 0 && b.writing != core->block)) {
                Fail("%s of block %d writes what another block uses", name, core->block);
            }
        }
        bool ours = &memory == &ub || b.writing == core->block;
        if (ours && b.wrote > seen[b.writer]) {
            Fail("%s on pipe %s writes byte %llu of %s while pipe %s may still write it", name,
                 PIPE_NAMES[pipe_], (unsigned long long)i, memory.name, PIPE_NAMES[b.writer]);
        }
        for (int p = 0; p < PIPES; ++p) {
            bool itself = p == pipe_ && b.read[p] == time_;
            if (b.read[p] > seen[p] && !itself) {
                Fail("%s on pipe %s writes byte %llu of %s while pipe %s may still read it", name,
                     PIPE_NAMES[pipe_], (unsigned long long)i, memory.name, PIPE_NAMES[p]);
            }
        }
        b.wrote = time_;
        b.writer = pipe_;
        b.known = true;
        b.writing = &memory == &ub ? -1 : core->block;
    }
    return memory.data + at;
}

Memory& Find(const void* at, uint64_t size)
{
    const uint8_t* p = static_cast<const uint8_t*>(at);
    for (Memory& m : global) {
        if (p >= m.data && p + size <= m.data + m.size) {
            return m;
        }
    }
    Fail("there is no memory of %llu bytes at this address", (unsigned long long)size);
}

void Begin(uint32_t count)
{
    blocks = count;
    for (Memory& m : global) {
        for (Byte& b : m.bytes) {
            b = Byte{0, {}, S, b.known, -1, -1, false};
        }
    }
}

void Finish()
{
    if (!core->flags.empty()) {
        Fail("a flag was set that nobody waits for");
    }
}

}  // namespace shim

// For the driver: memory of the device, and none.
extern "C" void shim_memory(uint8_t* data, uint64_t size, int known)
{
    shim::global.push_back({"global memory", data, size, std::vector<shim::Byte>(size)});
    for (shim::Byte& b : shim::global.back().bytes) {
        b.known = known != 0;
    }
}

extern "C" void shim_clear() { shim::global.clear(); }

// Bytes that are still poison.
extern "C" uint64_t shim_unwritten()
{
    uint64_t n = 0;
    for (const shim::Memory& m : shim::global) {
        for (const shim::Byte& b : m.bytes) {
            n += !b.known;
        }
    }
    return n;
}
