// What a kernel must not do, each thing once: `misuse NAME` aborts, `misuse right` does not.
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "kernel_operator.h"

extern "C" void shim_memory(uint8_t* data, uint64_t size, int known);

using namespace AscendC;

namespace {

constexpr uint32_t N = 64;
float input[4 * N], output[4 * N];

struct Kernel {
    TPipe pipe;
    TQue<TPosition::VECIN, 1> in;
    TQue<TPosition::VECOUT, 1> out;
    TBuf<TPosition::VECCALC> a_, b_;
    GlobalTensor<float> from, to;
    LocalTensor<float> a, b;
    Kernel()
    {
        from.SetGlobalBuffer(input, 4 * N);
        to.SetGlobalBuffer(output, 4 * N);
        pipe.InitBuffer(in, 2, N * sizeof(float));
        pipe.InitBuffer(out, 2, N * sizeof(float));
        pipe.InitBuffer(a_, N * sizeof(float));
        pipe.InitBuffer(b_, N * sizeof(float));
        a = a_.Get<float>();
        b = b_.Get<float>();
    }
    LocalTensor<float> Load(uint32_t at = 0)
    {
        LocalTensor<float> x = in.AllocTensor<float>();
        DataCopy(x, from[at], N);
        in.EnQue(x);
        return in.DeQue<float>();
    }
    void Store(uint32_t at)
    {
        LocalTensor<float> y = out.AllocTensor<float>();
        Adds(y, a, 1.0f, N);
        out.EnQue(y);
        y = out.DeQue<float>();
        DataCopy(to[at], y, N);
        out.FreeTensor(y);
    }
    void Fill()
    {
        Duplicate(a, 1.0f, N);
        PipeBarrier<PIPE_V>();
    }
};

const std::map<std::string, std::function<void(Kernel&)>> CASES = {
    {"right", [](Kernel& k) {
         for (uint32_t i = 0; i < 3; ++i) {
             LocalTensor<float> x = k.Load(i);
             Abs(k.a, x, N);
             PipeBarrier<PIPE_V>();
             k.in.FreeTensor(x);
             k.Store(GetBlockIdx() * N);
             PipeBarrier<PIPE_ALL>();
         }
         SetFlag<HardEvent::V_S>(0);
         WaitFlag<HardEvent::V_S>(0);
         k.a.GetValue(0);
     }},
    {"no EnQue", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x, k.from, N);
         Abs(k.a, x, N);
     }},
    {"no EnQue out", [](Kernel& k) {
         LocalTensor<float> y = k.out.AllocTensor<float>();
         Duplicate(y, 1.0f, N);
         DataCopy(k.to, y, N);
     }},
    {"no FreeTensor", [](Kernel& k) { k.Load(), k.Load(), k.Load(); }},
    {"FreeTensor too early", [](Kernel& k) {
         LocalTensor<float> x = k.Load();
         k.in.FreeTensor(x);
         Abs(k.a, x, N);
     }},
    {"FreeTensor of another", [](Kernel& k) {
         k.Load();
         k.in.FreeTensor(k.a);
     }},
    {"DeQue of nothing", [](Kernel& k) { k.in.DeQue<float>(); }},
    {"EnQue over the depth", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>(), y = k.in.AllocTensor<float>();
         k.in.EnQue(x);
         k.in.EnQue(y);
     }},
    {"no barrier", [](Kernel& k) {
         Duplicate(k.a, 1.0f, N);
         Abs(k.b, k.a, N);
     }},
    {"no barrier before a write", [](Kernel& k) {
         k.Fill();
         Abs(k.b, k.a, N);
         Duplicate(k.a, 2.0f, N);
     }},
    {"no barrier between writes", [](Kernel& k) {
         Duplicate(k.a, 1.0f, N);
         Duplicate(k.a, 2.0f, N);
     }},
    {"no barrier between copies", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x, k.from, N);
         DataCopy(x, k.from[8], N);
     }},
    {"the barrier of another pipe", [](Kernel& k) {
         Duplicate(k.a, 1.0f, N);
         PipeBarrier<PIPE_MTE2>();
         Abs(k.b, k.a, N);
     }},
    {"GetValue without a flag", [](Kernel& k) {
         k.Fill();
         k.a.GetValue(0);
     }},
    {"SetValue without a flag", [](Kernel& k) {
         k.a.SetValue(0, 1.0f);
         Abs(k.b, k.a, 1);
     }},
    {"SetFlag twice", [](Kernel&) {
         SetFlag<HardEvent::V_S>(0);
         SetFlag<HardEvent::V_S>(0);
     }},
    {"WaitFlag alone", [](Kernel&) { WaitFlag<HardEvent::V_S>(0); }},
    {"SetFlag alone", [](Kernel&) { SetFlag<HardEvent::V_S>(0); }},
    {"event 8", [](Kernel&) { SetFlag<HardEvent::V_S>(8); }},
    {"an operand that is not aligned", [](Kernel& k) {
         k.Fill();
         Abs(k.b, k.a[4], 8);
     }},
    {"DataCopy that is not aligned", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x[1], k.from, 8);
     }},
    {"DataCopy of 12 bytes", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x, k.from, 3);
     }},
    {"a lane too many", [](Kernel& k) {
         k.Fill();
         Abs(k.b, k.a, N + 1);
     }},
    {"an element behind the end", [](Kernel& k) { k.a[N + 1]; }},
    {"global memory behind the end", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x, k.from[4 * N - 8], 16);
     }},
    {"global memory that is not there", [](Kernel& k) { k.from.SetGlobalBuffer(input, 4 * N + 1); }},
    {"global memory nobody wrote", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopy(x, k.to, N);
     }},
    {"poison", [](Kernel& k) { Abs(k.b, k.a, N); }},
    {"poison of padding", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopyPad(x, k.from, DataCopyExtParams{1, 20, 0, 0, 0}, DataCopyPadExtParams<float>{false, 0, 3, 0});
         k.in.EnQue(x);
         x = k.in.DeQue<float>();
         Abs(k.a, x, 8);
     }},
    {"33 bytes of padding", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopyPad(x, k.from, DataCopyExtParams{1, 20, 0, 0, 0}, DataCopyPadExtParams<float>{true, 0, 9, 0});
     }},
    {"blockCount 4096", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopyPad(x, k.from, DataCopyExtParams{4096, 4, 0, 0, 0}, DataCopyPadExtParams<float>{true, 0, 0, 0});
     }},
    {"blockLen of half an element", [](Kernel& k) {
         LocalTensor<float> x = k.in.AllocTensor<float>();
         DataCopyPad(x, k.from, DataCopyExtParams{1, 6, 0, 0, 0}, DataCopyPadExtParams<float>{true, 0, 0, 0});
     }},
    {"too much for the Unified Buffer", [](Kernel& k) {
         TBuf<TPosition::VECCALC> large;
         k.pipe.InitBuffer(large, 192 * 1024);
     }},
    {"Cast of f32 to int8", [](Kernel& k) {
         k.Fill();
         Cast(k.b.ReinterpretCast<int8_t>(), k.a, RoundMode::CAST_RINT, N);
     }},
    {"Cast of bf16 to half", [](Kernel& k) {
         Cast(k.b.ReinterpretCast<half>(), k.a.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_RINT, N);
     }},
    {"Cast to e4m3", [](Kernel& k) {
         k.Fill();
         Cast(k.b.ReinterpretCast<fp8_e4m3fn_t>(), k.a, RoundMode::CAST_RINT, N);
     }},
    {"Cast of 300 to int8", [](Kernel& k) {
         Duplicate(k.a.ReinterpretCast<half>(), half(300), N);
         PipeBarrier<PIPE_V>();
         Cast(k.b.ReinterpretCast<int8_t>(), k.a.ReinterpretCast<half>(), RoundMode::CAST_RINT, N);
     }},
    {"Cast of 1e6 to half", [](Kernel& k) {
         Duplicate(k.a, 1e6f, N);
         PipeBarrier<PIPE_V>();
         Cast(k.b.ReinterpretCast<half>(), k.a, RoundMode::CAST_RINT, N);
     }},
    {"Cast onto itself", [](Kernel& k) {
         k.Fill();
         Cast(k.a, k.a.ReinterpretCast<half>(), RoundMode::CAST_NONE, N);
     }},
    {"operands that overlap", [](Kernel& k) {
         k.Fill();
         Abs(k.a[8], k.a, 16);
     }},
    {"And of int32", [](Kernel& k) {
         k.Fill();
         LocalTensor<int32_t> x = k.a.ReinterpretCast<int32_t>();
         And(k.b.ReinterpretCast<int32_t>(), x, x, N);
     }},
    {"Duplicate of int8", [](Kernel& k) { Duplicate(k.a.ReinterpretCast<int8_t>(), int8_t(0), N); }},
    {"an integer that overflows", [](Kernel& k) {
         LocalTensor<int16_t> x = k.a.ReinterpretCast<int16_t>();
         Duplicate(x, int16_t(32767), N);
         PipeBarrier<PIPE_V>();
         Adds(x, x, int16_t(1), N);
     }},
    {"division by 0", [](Kernel& k) {
         k.Fill();
         Duplicate(k.b, 0.0f, N);
         PipeBarrier<PIPE_V>();
         Div(k.a, k.a, k.b, N);
     }},
    {"65 lanes in a repeat", [](Kernel& k) {
         k.Fill();
         ReduceRepeat<ReduceType::MAX>(k.b, k.a, 65, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
     }},
    {"256 repeats", [](Kernel& k) {
         k.Fill();
         ReduceRepeat<ReduceType::MAX>(k.b, k.a, 8, 256, 1, 1, 0, ReduceOrder::ORDER_ONLY_VALUE);
     }},
    {"a sum that depends on its order", [](Kernel& k) {
         Duplicate(k.a, 0.1f, N);
         PipeBarrier<PIPE_V>();
         ReduceRepeat<ReduceType::SUM>(k.b, k.a, 64, 1, 1, 1, 8);
     }},
    {"Brcb of stride 0", [](Kernel& k) {
         k.Fill();
         Brcb(k.b, k.a, 1, {0, 8});
     }},
    {"blocks that write the same", [](Kernel& k) {
         k.Fill();
         k.Store(0);
     }},
    {"blocks that read what others write", [](Kernel& k) {
         k.Fill();
         if (GetBlockIdx() == 0) {
             k.Store(0);
         } else {
             LocalTensor<float> x = k.in.AllocTensor<float>();
             DataCopy(x, k.to, N);
         }
     }},
    {"a copy in before the copy out is done", [](Kernel& k) {
         if (GetBlockIdx() == 0) {
             k.Fill();
             k.Store(0);
             LocalTensor<float> x = k.in.AllocTensor<float>();
             DataCopy(x, k.to, N);
         }
     }},
};

}  // namespace

int main(int argc, char** argv)
{
    if (argc != 2) {
        for (const auto& one : CASES) {
            std::printf("%s\n", one.first.c_str());
        }
        return 0;
    }
    for (float& x : input) {
        x = -1;
    }
    shim_memory(reinterpret_cast<uint8_t*>(input), sizeof input, 1);
    shim_memory(reinterpret_cast<uint8_t*>(output), sizeof output, 0);
    shim::Launch(2, [&] {
        Kernel kernel;
        CASES.at(argv[1])(kernel);
    });
    return 0;
}
