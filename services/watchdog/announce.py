"""What a transition of the record means, in events with stable codes: pure."""

from common.slots import Record
from common.states import Severity, SlotState
from services.watchdog.facts import Event, Transition

_CODES = {
    "hand_over": ("model.handed_over", Severity.INFO),
    "abandon": ("model.abandoned", Severity.WARNING),
    "take_over": ("lane.took_over", Severity.WARNING),
    "mark_good": ("model.good", Severity.INFO),
    "fail_soak": ("model.rolled_back", Severity.ERROR),
    "give_way": ("model.gave_way", Severity.ERROR),
    "restore": ("model.restored", Severity.INFO),
}


def events(order: Transition, before: Record, after: Record) -> list[Event]:
    """What to announce when `order` made `after` of `before`."""
    code, severity = _CODES[order.kind]
    because = f": {order.reason}" if order.reason else ""
    txn = before.txn
    lane = order.lane or txn.lane or after.live
    slot = txn.slot or after.lanes[lane].slot
    words = {
        "hand_over": f"lane {lane} is live with {_name(after, slot)}; its soak begins",
        "abandon": f"{_name(after, slot)} does not become live",
        "take_over": f"lane {order.lane} took over",
        "mark_good": f"{_name(after, slot)} is good",
        "fail_soak": f"{_name(after, slot)} failed its soak; lane {after.live} is live with "
        f"{_name(after, after.lanes[after.live].slot)}",
        "give_way": f"{_name(before, before.lanes[lane].slot)} keeps dying in lane {lane}; it gave "
        f"way to {_name(after, after.lanes[lane].slot)}",
        "restore": f"lane {lane} tries {_name(after, after.lanes[lane].slot)} again",
    }
    data = {"group": order.group, "lane": lane, "slot": slot}
    found = [Event(code, severity, words[order.kind] + because, data)]
    for name, row in after.slots.items():
        known = before.slots.get(name)
        if row.state is SlotState.BAD and (known is None or known.state is not SlotState.BAD):
            text = f"{_name(after, name)} is bad: {row.reason}"
            data = {"group": order.group, "slot": name}
            found.append(Event("model.bad", Severity.ERROR, text, data))
            if order.kind == "take_over":  # in soak
                text = f"lane {after.live} is live again with the model before"
                found.append(Event("model.rolled_back", Severity.ERROR, text, data))
    return found


def _name(record: Record, slot: str) -> str:
    known = record.slots.get(slot)
    return f"{known.name} {known.version}" if known and known.name else f"slot {slot[:12]}"
