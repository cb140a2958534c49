// The Python module `firstlight.kernels._native`: kernels on raw addresses; shapes are checked by their callers in
// src/firstlight/kernels/cpu/. Kernels run without Python's lock.
#include <malloc.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "binding.h"
#include "dispatch.h"
#include "tape.h"

namespace nb = nanobind;
using namespace firstlight;

namespace {

const Kernels* active = usable().front();

std::vector<std::string> variants() {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.push_back(k->name);
    return names;
}

bool choose(const std::string& name) {
    for (const Kernels* k : usable())
        if (name == k->name) return active = k, true;
    return false;
}

template <class T>
T* at(Address a) {
    return (T*)a;
}

// What Python does between two instructions of its own: Ctrl-C raises.
void hear_signals() {
    nb::gil_scoped_acquire held;
    if (PyErr_CheckSignals()) throw nb::python_error();
}

using Numbers = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

PlanLists lists_of(const int64_t* p) {
    PlanLists lists{};
    lists.q_tile = p[0], lists.blk = p[1], lists.num_lists = p[2], lists.head_map = at<int16_t>(p[3]);
    lists.tile_base = at<int32_t>(p[4]), lists.tile_first = at<int32_t>(p[5]), lists.tile_map = at<int32_t>(p[6]);
    lists.band = at<int32_t>(p[7]), lists.blk_ptr = at<int32_t>(p[8]), lists.blk_idx = at<int32_t>(p[9]);
    lists.col_ptr = at<int32_t>(p[10]), lists.col_idx = at<int32_t>(p[11]);
    lists.skip_log = at<float>(p[12]), lists.scan = p[13];
    return lists;
}

// `call`, `probe`, and what lies at `plan`: the fields of AttnArgs, the probe's and PlanLists in the order of
// cpu/attention.py. Views and plan are read when the call is made; a plan of no lists is none.
int64_t attend(Numbers call, Address plan, std::optional<Numbers> probe, Address views, float scale, float cap,
               int64_t r0, int64_t r1, int threads, bool bf16, bool bytes) {
    const int64_t* c = call.data();
    AttnArgs a{};
    a.q = at<void>(c[0]), a.q_row = c[1], a.q_head = c[2];
    a.out = at<void>(c[3]), a.out_row = c[4], a.out_head = c[5];
    a.lse = at<float>(c[6]), a.k = at<void>(c[7]), a.v = at<void>(c[8]);
    a.num_heads = c[9], a.num_kv_heads = c[10], a.head_dim = c[11];
    a.num_requests = c[12], a.row_ptr = at<int64_t>(c[13]), a.tok = at<int64_t>(c[14]), a.pos = at<int64_t>(c[15]);
    a.model_window = c[16];
    a.scale = scale, a.cap = cap, a.r0 = r0, a.r1 = r1, a.threads = threads;
    if (probe) {
        const int64_t *p = probe->data(), n = a.num_requests;
        a.probe_first = p, a.probe_sums = (float* const*)(p + n), a.probe_len = p + 2 * n;
    }
    if (recorder && probe) recorder->is_whole = false;  // its sums are this call's alone
    nb::gil_scoped_release free;
    return perform(
        [kernels = active, bf16, bytes](AttnArgs a, Address views, Address plan) {
            const PlanLists lists = plan ? lists_of(at<int64_t>(plan)) : PlanLists{};
            a.views = at<int64_t>(views), a.plan = lists.num_lists ? &lists : nullptr;
            return kernels->attend(a, bf16, bytes);
        },
        a, views, plan);
}

float* as(Address a) { return at<float>(a); }
int64_t as(int64_t n) { return n; }
float as(float x) { return x; }
Gate as(int gate) { return (Gate)gate; }

// A row operator: what all of them take, in the order of RowArgs, then its own arguments.
template <auto op, class... Own>
auto row_operator() {
    return [](Address in, Address out, int64_t in_row, int64_t out_row, int64_t rows, int64_t width, int threads,
              bool bf16, Address in_scale, Address out_scale, Address smooth, Own... own) {
        perform(
            [=, kernels = active](Address in, Address out, Address in_scale, Address out_scale, Address smooth, Own... own) {
                const RowArgs common{at<void>(in), at<void>(out), in_row, out_row, rows, width, threads,
                                     bf16, as(in_scale), as(out_scale), as(smooth)};
                (kernels->*op)(common, as(own)...);
            },
            in, out, in_scale, out_scale, smooth, own...);
    };
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // tapes that are alive when the interpreter ends are no news
    m.def("variants", variants, "names of the variants that this processor can run, the fastest first");
    m.def("choose", choose, nb::arg("name"), "run this variant from now on; false if the processor can't");
    m.def("active", [] { return std::string(active->name); });
    m.def("attend", attend, nb::arg("call"), nb::arg("plan"), nb::arg("probe").none(), nb::arg("views"),
          nb::arg("scale"), nb::arg("cap"), nb::arg("r0"), nb::arg("r1"), nb::arg("threads"), nb::arg("bf16"),
          nb::arg("bytes"));
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    m.def("rms_norm", row_operator<&Kernels::rms_norm, Address, float>(), unlocked);
    m.def("add_norm", row_operator<&Kernels::add_norm, Address, int64_t, Address, float>(), unlocked);
    m.def("add_rows", row_operator<&Kernels::add_rows, Address, int64_t>(), unlocked);
    m.def("copy_rows", row_operator<&Kernels::copy_rows>(), unlocked);
    m.def("shift_rows", row_operator<&Kernels::shift_rows, Address>(), unlocked);
    m.def("rotate", row_operator<&Kernels::rotate, int64_t, Address, Address, Address, float>(), unlocked);
    m.def("gate_mul", row_operator<&Kernels::gate_mul, int>(), unlocked);
    m.def(
        "write_kv",
        [](Address k, Address v, int64_t k_row, int64_t v_row, Address k_blocks, Address v_blocks, Address slots, int64_t rows, int64_t heads, int64_t dim, int threads, bool bf16, bool bytes) {
            perform(
                [=, kernels = active](Address slots) {
                    kernels->write_kv({at<void>(k), at<void>(v), k_row, v_row, at<void>(k_blocks), at<void>(v_blocks), at<int64_t>(slots), rows, heads, dim, threads, bf16, bytes});
                },
                slots);
        },
        unlocked);
    m.def(
        "read_keys",
        [](Address k_blocks, Address table, Address out, int64_t blocks, int64_t dim, int threads, bool bf16) {
            const KeysArgs call{at<void>(k_blocks), at<int32_t>(table), at<void>(out), blocks, dim, threads, bf16};
            perform([=, kernels = active] { kernels->read_keys(call); });
        },
        unlocked);
    m.def("bind", bind, unlocked, nb::arg("cores"), "this thread and those that compute for it stay on these cores, given as lists of CPUs");
    m.def("unbind", unbind, "this thread may run anywhere again");
    m.def("trim", [] {  // give free memory back to the system
#if defined(__GLIBC__)
        malloc_trim(0);
#endif
    });
    m.def(
        "matmul",
        [](Address x, Address w, Address out, int64_t x_row, int64_t out_row, int64_t rows, int64_t width, int64_t outputs, int threads, int weights, bool wide, Address scale, Address start, Address blocks) {
            perform(
                [=, kernels = active](Address w, Address scale, Address start, Address blocks) {
                    kernels->matmul({at<void>(x), x_row, at<void>(w), at<void>(out), out_row, rows, width, outputs, threads, wide, as(scale), at<int32_t>(start), at<Blocks>(blocks)}, (Weights)weights);
                },
                w, scale, start, blocks);
        },
        unlocked);
    nb::class_<Bell>(m, "Bell", "calls whoever drives a tape away from it")
        .def(nb::init<>())
        .def("after", &Bell::after, nb::arg("seconds"), "it rings by itself after so many seconds")
        .def("ring", &Bell::ring, "now, from any thread");
    nb::class_<Tape>(m, "Tape", "calls of kernels and of Python's functions, to be made later or again")
        .def(nb::init<>())
        .def_rw("is_whole", &Tape::is_whole, "whether running it does all that was done in the recording")
        .def_rw("holds", &Tape::holds, "whether calls are noted only, to be made when it is run")
        .def("note", [](Tape& tape, nb::callable function, nb::tuple args) {
            tape.note([function = std::move(function), args = std::move(args)] {
                nb::gil_scoped_acquire held;
                function(*args);
            });
        }, nb::arg("function"), nb::arg("args"), "one more call")
        .def("extend", [](Tape& tape, const Tape& other) {
            tape.calls.insert(tape.calls.end(), other.calls.begin(), other.calls.end());
            tape.is_whole &= other.is_whole;
        }, nb::arg("other"), "what another tape does, afterwards")
        .def("repeat", &Tape::repeat, nb::arg("tape"), nb::arg("begin"), nb::arg("end"), nb::arg("old"), nb::arg("sets"), "calls [begin, end) of a tape, afterwards, once for each set of new addresses for old ones")
        .def("__len__", [](const Tape& tape) { return tape.calls.size(); })
        .def("run", &Tape::run, unlocked, nb::arg("begin") = 0, nb::arg("end") = SIZE_MAX, "make calls [begin, end)")
        .def("timed", [](const Tape& tape, size_t begin, const std::vector<size_t>& ends, const Bell& bell) {
            return tape.timed(begin, ends, bell, hear_signals);
        }, unlocked, nb::arg("begin"), nb::arg("ends"), nb::arg("bell"), "make calls from `begin` up to each of these ends, till the bell rings; the seconds of each stretch. Ctrl-C is raised");
    m.def("record", [](Tape* tape) { return std::exchange(recorder, tape) != nullptr; }, nb::arg("tape").none(),
          "from now on this tape notes the thread's calls of kernels; None: nobody does");
}
