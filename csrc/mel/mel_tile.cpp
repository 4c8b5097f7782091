// Compiled once per instruction set; see common/isa.h. No torch header here.
namespace mmfast::mel::MMFAST_ISA {}
