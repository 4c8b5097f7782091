// Launches of compiled kernels made again, and what of tensors they depend on. The driver is asked for by name at run time, so that
// nothing here needs CUDA to be built. For fusion_replay.cpp.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/plain.h"

namespace mmfast {
namespace {

using at::Tensor;
using std::vector;

// ---- The driver

struct Driver {
    using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                           void* stream, void** arguments, void** extra);
    Launch launch;
    int (*get_context)(void**);
    int (*set_context)(void*);

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_LAZY);
        const auto find = [library](const char* name) { return library ? dlsym(library, name) : nullptr; };
        launch = reinterpret_cast<Launch>(find("cuLaunchKernel"));
        get_context = reinterpret_cast<int (*)(void**)>(find("cuCtxGetCurrent"));
        set_context = reinterpret_cast<int (*)(void*)>(find("cuCtxSetCurrent"));
        if (!launch || !get_context || !set_context) throw std::runtime_error("libcuda.so.1 cannot be loaded");
    }
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }
};

// ---- What was recorded

struct Room {
    vector<int64_t> sizes, strides;
    at::ScalarType type;

    // at::empty_strided on the current device, without the dispatcher.
    Tensor make(const at::Device& device) const {
        const at::Context& context = at::globalContext();
        if (!(device.is_cpu() || device.is_cuda()) ||
            (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()))
            return at::empty_strided(sizes, strides, at::TensorOptions().device(device).dtype(type));
        c10::Allocator* const allocator =
            device.is_cpu() ? c10::GetCPUAllocator() : at::detail::getCUDAHooks().getCUDADeviceAllocator();
        const auto kind = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
        return Tensor(at::detail::empty_strided_generic(sizes, strides, allocator, c10::DispatchKeySet(kind), type));
    }
};

struct Launch {
    uint64_t function;
    std::array<unsigned, 3> grid;
    unsigned threads, shared;
    vector<uint64_t> arguments;  // each in the first bytes of its word
    vector<std::pair<size_t, size_t>>
        pointers;  // of these the ones that are addresses, and of what: inputs, then rooms
};

class Recording {
public:
    Recording(vector<std::tuple<vector<int64_t>, vector<int64_t>, at::ScalarType>> rooms, at::Device device)
        : device_(device) {
        for (auto& [sizes, strides, type] : rooms) rooms_.push_back({std::move(sizes), std::move(strides), type});
        Driver::get().get_context(&context_);
    }
    void add(uint64_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
             vector<uint64_t> arguments, vector<std::pair<size_t, size_t>> pointers) {
        launches_.push_back({function, grid, threads, shared, std::move(arguments), std::move(pointers)});
    }
    // The memory that was made, for inputs at these addresses.
    vector<Tensor> again(at::ArrayRef<uint64_t> inputs, uint64_t stream) const {
        const c10::OptionalDeviceGuard guard(device_.is_cpu() ? std::nullopt : std::optional(device_));
        c10::SmallVector<uint64_t, 24> where(inputs.begin(), inputs.end());
        vector<Tensor> made;
        made.reserve(rooms_.size());
        for (const Room& room : rooms_) {
            made.push_back(room.make(device_));
            where.push_back(reinterpret_cast<uint64_t>(made.back().const_data_ptr()));
        }
        const Driver& driver = Driver::get();
        void* current = nullptr;
        driver.get_context(&current);
        if (!current) driver.set_context(context_);  // a thread of autograd that has not met the device yet
        c10::SmallVector<uint64_t, 96> arguments;
        c10::SmallVector<void*, 96> places;
        for (const Launch& launch : launches_) {
            arguments.assign(launch.arguments.begin(), launch.arguments.end());
            for (const auto& [i, of] : launch.pointers) arguments[i] = where[of];
            places.clear();
            for (uint64_t& argument : arguments) places.push_back(&argument);
            const int error = driver.launch(reinterpret_cast<void*>(launch.function), launch.grid[0], launch.grid[1],
                                            launch.grid[2], launch.threads, 1, 1, launch.shared,
                                            reinterpret_cast<void*>(stream), places.data(), nullptr);
            if (error)
                throw std::runtime_error("a kernel could not be launched: CUDA's error " + std::to_string(error));
        }
        return made;
    }

private:
    vector<Room> rooms_;
    vector<Launch> launches_;
    at::Device device_;
    void* context_ = nullptr;
};

// ---- What of tensors a launch depends on

struct Description {
    c10::SmallVector<int64_t, 128> what;
    c10::SmallVector<uint64_t, 16> addresses;

    std::string_view key() const { return {reinterpret_cast<const char*>(what.data()), what.size() * sizeof(int64_t)}; }
    // Adds dtypes, sizes, strides, alignment, whether autograd follows them, and which lie at the same address. False where one of
    // them is not plain memory of the device.
    bool add(at::TensorList tensors, int64_t device) {
        for (const Tensor& t : tensors) {
            if (!holds_its_values(t) || (t.device().is_cpu() ? -1 : t.get_device()) != device) return false;
            const auto address = reinterpret_cast<uint64_t>(t.const_data_ptr());
            const int64_t same = std::find(addresses.begin(), addresses.end(), address) - addresses.begin();
            addresses.push_back(address);
            what.push_back(int64_t(t.scalar_type()) << 32 | int64_t(address % 16) << 24 | t.dim() << 16 | same << 1 |
                           int64_t(t.requires_grad()));
            what.append(t.sizes().begin(), t.sizes().end());
            what.append(t.strides().begin(), t.strides().end());
        }
        return true;
    }
};

// Of maps whose keys are those of descriptions.
struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view key) const { return std::hash<std::string_view>()(key); }
};
template <class T>
using ByKey = std::unordered_map<std::string, T, Hash, std::equal_to<>>;

}  // namespace
}  // namespace mmfast
