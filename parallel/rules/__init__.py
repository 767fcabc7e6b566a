"""Update rules: how a step changes parameters, given what each rule needs to see of them.

A rank holds parts of parameters: tensor parallelism, ZeRO and DeepSpeed's flat ranges divide them. A rule declares what
it needs (`stoker.parallel.optimizer_needs`), and gets that on every layout:

`elementwise`   each element separately: AdamW and SGD (`stoker.parallel.optimizer`), Lion. No message.
`norms`         norms of whole parameters: LAMB. One all-reduce of two numbers a parameter.
`matrix`        whole matrices: Muon, and a user's optimizer that asks for them. Each matrix has one owner among the
                ranks that hold it (`ownership`), to which its rectangles go and from which the update comes back:
                one all-to-all each way.

`settings`      which rule, rate and decay each parameter has: by its role, and by the groups of the config
`combined`      all rules of a run as one optimizer
`user_wholes`   a user's torch optimizer on whole parameters

State has the shape of this rank's part of the parameter, whoever computes the update, so that checkpoints do not depend
on the rule's owners. The one exception, a user's optimizer on whole parameters, has its state on the owner, as one
chunk that covers the parameter.

Nothing here waits for the device: a step that must be left out is left out by arithmetic.
"""
