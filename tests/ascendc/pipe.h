// What orders the pipes: barriers, flags, and queues, which set flags of their own.
#pragma once

#include <deque>

#include "tensor.h"

enum pipe_t { PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace AscendC {

using TEventID = int32_t;
enum class TPosition { VECIN, VECOUT, VECCALC };
enum class HardEvent { MTE2_V, V_MTE2, V_MTE3, MTE3_V, MTE2_MTE3, MTE3_MTE2, V_S, S_V, MTE2_S, S_MTE2, S_MTE3, MTE3_S };

template <pipe_t pipe>
void PipeBarrier()
{
    using namespace shim;
    constexpr Pipe one[] = {V, MTE2, MTE3};
    if constexpr (pipe == PIPE_ALL) {
        for (auto& seen : core->seen) {
            seen = core->now;
        }
    } else {
        core->seen[one[pipe]][one[pipe]] = core->now[one[pipe]];
    }
}

constexpr std::pair<shim::Pipe, shim::Pipe> Ends(HardEvent event)
{
    using namespace shim;
    constexpr std::pair<Pipe, Pipe> ends[] = {{MTE2, V}, {V, MTE2}, {V, MTE3}, {MTE3, V}, {MTE2, MTE3}, {MTE3, MTE2},
                                              {V, S}, {S, V}, {MTE2, S}, {S, MTE2}, {S, MTE3}, {MTE3, S}};
    return ends[int(event)];
}

template <HardEvent event>
void SetFlag(TEventID id)
{
    auto key = std::make_pair(int(event), id);
    if (id < 0 || id > 7) {
        shim::Fail("event %d: there are 0 to 7", id);
    }
    if (shim::core->flags.count(key)) {
        shim::Fail("SetFlag: event %d is set already", id);
    }
    shim::core->flags[key] = shim::core->Snapshot(Ends(event).first);
}

template <HardEvent event>
void WaitFlag(TEventID id)
{
    auto found = shim::core->flags.find({int(event), id});
    if (found == shim::core->flags.end()) {
        shim::Fail("WaitFlag: nobody set event %d, the core hangs", id);
    }
    shim::core->Wait(Ends(event).second, found->second);
    shim::core->flags.erase(found);
}

// A queue of `depth` tensors between the pipe that fills them and the one that empties them.
template <TPosition from, TPosition to, int depth>
class TQueBind {
public:
    struct Buffer {
        uint32_t at = 0;
        enum { FREE, TAKEN, QUEUED, OUT } state = FREE;
        shim::Clock done{};  // when the pipe before was through with it
    };

    void Init(uint32_t at, uint32_t num, uint32_t len)
    {
        len_ = len;
        for (uint32_t i = 0; i < num; ++i) {
            buffers_.push_back({at + i * len});
        }
    }
    template <typename T>
    LocalTensor<T> AllocTensor()
    {
        for (size_t i = 0; i < buffers_.size(); ++i) {
            Buffer& b = buffers_[(next_ + i) % buffers_.size()];
            if (b.state == Buffer::FREE) {
                next_ = (next_ + i + 1) % buffers_.size();
                b.state = Buffer::TAKEN;
                shim::core->Wait(first, b.done);
                shim::ub.Poison(b.at, len_);
                return {b.at, len_};
            }
        }
        shim::Fail("AllocTensor: all %zu buffers of the queue are in use, the core hangs", buffers_.size());
    }
    template <typename T>
    bool EnQue(const LocalTensor<T>& tensor)
    {
        Buffer& b = Of(tensor.at, Buffer::TAKEN, "EnQue: the tensor was not taken from this queue");
        if (queued_.size() == depth) {
            shim::Fail("EnQue: more than %d tensors in the queue", depth);
        }
        b.state = Buffer::QUEUED;
        b.done = shim::core->Snapshot(first);
        queued_.push_back(b.at);
        return true;
    }
    template <typename T>
    LocalTensor<T> DeQue()
    {
        if (queued_.empty()) {
            shim::Fail("DeQue: the queue is empty, the core hangs");
        }
        Buffer& b = Of(queued_.front(), Buffer::QUEUED, "");
        queued_.pop_front();
        b.state = Buffer::OUT;
        shim::core->Wait(second, b.done);
        return {b.at, len_};
    }
    template <typename T>
    void FreeTensor(const LocalTensor<T>& tensor)
    {
        Buffer& b = Of(tensor.at, Buffer::OUT, "FreeTensor: the tensor did not come out of this queue");
        b.state = Buffer::FREE;
        b.done = shim::core->Snapshot(second);
        for (uint32_t i = b.at; i < b.at + len_; ++i) {
            shim::ub.bytes[i].known = false;
        }
    }

private:
    static constexpr shim::Pipe first = from == TPosition::VECIN ? shim::MTE2 : shim::V;
    static constexpr shim::Pipe second = to == TPosition::VECOUT ? shim::MTE3 : shim::V;
    template <typename State>
    Buffer& Of(uint32_t at, State state, const char* message)
    {
        for (Buffer& b : buffers_) {
            if (b.at == at && b.state == state) {
                return b;
            }
        }
        shim::Fail("%s", message);
    }
    uint32_t len_ = 0;
    size_t next_ = 0;
    std::vector<Buffer> buffers_;
    std::deque<uint32_t> queued_;
};

// VECIN: copied in, then computed with. VECOUT: computed, then copied out.
template <TPosition position, int depth>
class TQue : public TQueBind<position, position == TPosition::VECIN ? TPosition::VECCALC : TPosition::VECOUT, depth> {};

template <TPosition position>
class TBuf {
public:
    template <typename T>
    LocalTensor<T> Get() const
    {
        return tensor_.template ReinterpretCast<T>();
    }
    LocalTensor<uint8_t> tensor_;
};

class TPipe {
public:
    TPipe() { Current() = this; }
    ~TPipe() { Current() = nullptr; }
    static TPipe*& Current()
    {
        static TPipe* pipe = nullptr;
        return pipe;
    }
    template <TPosition from, TPosition to, int depth>
    void InitBuffer(TQueBind<from, to, depth>& queue, uint8_t num, uint32_t len)
    {
        len = (len + 31) / 32 * 32;
        queue.Init(Take(num * len), num, len);
    }
    template <TPosition position>
    void InitBuffer(TBuf<position>& buffer, uint32_t len)
    {
        len = (len + 31) / 32 * 32;
        buffer.tensor_ = {Take(len), len};
    }
    TEventID FetchEventID(HardEvent) { return 0; }

private:
    uint32_t Take(uint32_t n)
    {
        uint32_t at = shim::core->used;
        if (uint64_t(at) + n > shim::ub.size) {
            shim::Fail("InitBuffer: %u bytes are used, %u more do not fit into %llu", at, n,
                       (unsigned long long)shim::ub.size);
        }
        shim::core->used += n;
        shim::ub.Poison(at, n);
        for (uint32_t i = at; i < at + n; ++i) {
            shim::ub.bytes[i] = shim::Byte{};
        }
        return at;
    }
};

inline TPipe* GetTPipePtr() { return TPipe::Current(); }

}  // namespace AscendC
