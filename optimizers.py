"""How the weights change: Muon or AdamW, and the learning rate of each step."""

import torch

MOMENTUM = 0.95  # of Muon
# Of the polynomial a x + b x^3 + c x^5 on the singular values, and how often it is applied (Jordan et al. 2024, who
# apply it three to five times).
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 3


def orthogonalise(matrix):
    """(m, n) float32 -> the same with singular values of about 1, those far below the largest less.

    In the precision of the autocast around it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)  # the Frobenius norm is at least the spectral one
    # Iterating the small gram = x x^T is cheaper than iterating x: each iteration multiplies x by a polynomial p of
    # gram, and gram by p from both sides.
    gram, product = x @ x.T, None
    for number in range(1, ITERATIONS + 1):
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        product = p if product is None else p @ product
        if number < ITERATIONS:
            gram = p @ gram @ p
    x = product @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the parameter groups with 'muon': convolutions' weights.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a weight (c_out, c_in, h, w) as a matrix of c_out rows.
    Its steps have about the root mean square of AdamW's at the same learning rate (Liu et al. 2025).
    torch.optim.Muon takes only matrices, and computes in bfloat16 whatever the CPU.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group['muon']:
                continue
            for weight in group['params']:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state['momentum'] = torch.zeros_like(weight)
                    state['step'] = torch.zeros(())  # AdamW.load_state_dict asks for it
                state['momentum'].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(state['momentum'], MOMENTUM).permute(0, 2, 3, 1)  # Nesterov's
                matrix = update.flatten(1)
                update = orthogonalise(matrix).view_as(update).permute(0, 3, 1, 2)
                weight.mul_(1 - group['lr'] * group['weight_decay'])
                weight.add_(update, alpha=-group['lr'] * 0.2 * max(matrix.shape) ** 0.5)
                weight.grad = None  # so that AdamW leaves it alone
        super().step()


def make_optimizer(model, weighting, lr, encoder_lr, weight_decay, muon=True):
    """AdamW, and with `muon` Muon for the hidden convolutions.

    The first parameter group is at `lr`, the last at `encoder_lr`. Weight decay is only on the weights of convolutions
    and linear layers.
    """
    groups = []
    others = [p for name, p in model.named_parameters() if not name.startswith('encoder.')] + [*weighting.parameters()]
    for parameters, rate in (others, lr), (list(model.encoder.parameters()), encoder_lr):
        hidden = [p for p in parameters if muon and is_hidden_convolution(p)]
        known = set(map(id, hidden))
        for by_muon, decay, chosen in (
            (True, weight_decay, hidden),
            (False, weight_decay, [p for p in parameters if id(p) not in known and p.ndim > 1]),
            (False, 0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                groups.append({'params': chosen, 'lr': rate, 'weight_decay': decay, 'muon': by_muon})
    return MuonAdamW(groups, lr, fused=True)


def is_hidden_convolution(parameter):
    """Whether it is a convolution's weight of at least 32 x 32 as a matrix: no last layer, no depthwise one."""
    return parameter.ndim == 4 and min(len(parameter), parameter[0].numel()) >= 32


def make_schedule(optimizer, total_steps):
    """The learning rate of each step: linear warm-up from a 25th over a fifth of the steps, then linear to almost zero.

    One cycle (Smith and Topin 2018). The first of Adam's betas moves from 0.95 to 0.85 and back meanwhile.
    """
    rates = [group['lr'] for group in optimizer.param_groups]
    steps = max(6, total_steps + 1)  # and the one after the last; OneCycleLR divides by zero for 5
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.2, anneal_strategy='linear'
    )
