}

std::tuple<Tensor, Tensor, Tensor> sums(const Tensor& x, const optional<Tensor>& y, const Terms& terms) {
    const int64_t batch = x.size(0);
    const mmd::Kernel kernel = kernel_of(terms, x.size(2));
    const mmd::Set sx = set_of(x, batch), sy = set_of(y, batch);
