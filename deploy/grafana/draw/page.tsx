// Draws one dashboard with Grafana's own components, without server or network. draw.py writes the dashboard and its data
// to `window.BOARD`; the page sets `window.READY` when it has drawn everything.
import {
  createTheme,
  dateTime,
  FieldColorModeId,
  FieldType,
  getDisplayProcessor,
  ThemeContext,
  toDataFrame,
  ThresholdsMode,
  type DataFrame,
  type Field,
  type GrafanaTheme2,
  type TimeRange,
} from '@grafana/data';
import {
  BarGauge,
  BigValue,
  BigValueColorMode,
  BigValueGraphMode,
  PanelChrome,
  TimeSeries,
  UPlotChart,
  UPlotConfigBuilder,
} from '@grafana/ui';
import { AxisPlacement, LegendDisplayMode, ScaleDirection, ScaleOrientation, VizOrientation } from '@grafana/schema';
import { createRoot } from 'react-dom/client';

interface Series {
  name: string;
  times: number[];
  values: Array<number | null>;
}
interface Panel {
  title: string;
  type: string;
  gridPos: { x: number; y: number; w: number; h: number };
  fieldConfig?: { defaults?: any; overrides?: any[] };
  series: Series[];
}
interface Board {
  title: string;
  from: number;
  to: number;
  panels: Panel[];
}

const CELL = 36;
const GAP = 8;
const board: Board = (window as any).BOARD;
const theme: GrafanaTheme2 = createTheme({ colors: { mode: 'dark' } });
const range: TimeRange = {
  from: dateTime(board.from),
  to: dateTime(board.to),
  raw: { from: dateTime(board.from), to: dateTime(board.to) },
};

function frameOf(panel: Panel): DataFrame {
  const times = [...new Set(panel.series.flatMap((s) => s.times))].sort((a, b) => a - b);
  const defaults = panel.fieldConfig?.defaults ?? {};
  const frame = toDataFrame({
    fields: [
      { name: 'time', type: FieldType.time, values: times, config: {} },
      ...panel.series.map((s) => {
        const at = new Map(s.times.map((time, i) => [time, s.values[i]]));
        const override = panel.fieldConfig?.overrides?.find((o) => o.matcher.options === s.name);
        const color = override?.properties?.find((p: any) => p.id === 'color')?.value;
        return {
          name: s.name,
          type: FieldType.number,
          values: times.map((time) => at.get(time) ?? null),
          config: {
            displayName: s.name,
            unit: defaults.unit,
            min: defaults.min,
            thresholds: defaults.thresholds ?? { mode: ThresholdsMode.Absolute, steps: [{ value: -Infinity, color: 'green' }] },
            color: color ?? { mode: FieldColorModeId.PaletteClassic },
            custom: {
              drawStyle: 'line',
              lineInterpolation: 'linear',
              axisPlacement: AxisPlacement.Auto,
              scaleDistribution: { type: 'linear' },
              gradientMode: 'none',
              hideFrom: { tooltip: false, viz: false, legend: false },
              ...defaults.custom,
            },
          },
        };
      }),
    ],
  });
  frame.fields.forEach((field: Field, index: number) => {
    field.state = { seriesIndex: index - 1 };
    field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
  });
  return frame;
}

function Lines({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const frame = frameOf(panel);
  return (
    <TimeSeries
      frames={[frame]}
      structureRev={1}
      width={width}
      height={height}
      timeRange={range}
      timeZone="utc"
      legend={{ displayMode: LegendDisplayMode.List, placement: 'bottom', showLegend: true, calcs: [] }}
    />
  );
}

function Number_({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const frame = frameOf(panel);
  const field = frame.fields[1];
  const numbers = field?.values.filter((value) => value !== null) ?? [];
  const shown = field?.display!(numbers.at(-1) ?? null) ?? { text: 'no data', numeric: NaN };
  const steps = field?.config.thresholds?.steps ?? [];
  const step = [...steps].reverse().find((each) => (each.value ?? -Infinity) <= shown.numeric);
  const color = theme.visualization.getColorByName(step?.color ?? 'green');
  return (
    <BigValue
      value={{ ...shown, color }}
      width={width}
      height={height}
      theme={theme}
      colorMode={BigValueColorMode.Value}
      graphMode={BigValueGraphMode.Area}
      sparkline={{ y: { ...field, config: { ...field.config, custom: {} } } as any, x: frame.fields[0] as any }}
    />
  );
}

function Bars({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const frame = frameOf(panel);
  const fields = frame.fields.slice(1);
  const each = Math.min(40, height / Math.max(1, fields.length));
  return (
    <div>
      {fields.map((field) => {
        const value = field.values.filter((v) => v !== null).at(-1) ?? 0;
        return (
          <BarGauge
            key={field.name}
            value={{ ...field.display!(value), title: field.name }}
            display={field.display!}
            field={{ ...field.config, min: 0, max: 1 }}
            width={width}
            height={each}
            theme={theme}
            orientation={VizOrientation.Horizontal}
            displayMode={'basic' as any}
            itemSpacing={4}
          />
        );
      })}
    </div>
  );
}

// @grafana/ui has no heatmap component, so draw the cells on its axes and canvas, by Grafana's rule.
function Cells({ panel, width, height }: { panel: Panel; width: number; height: number }) {
  const bounds = panel.series
    .map((s) => ({ le: s.name === '+Inf' ? Infinity : Number(s.name), s }))
    .sort((a, b) => a.le - b.le);
  const times = [...new Set(panel.series.flatMap((s) => s.times))].sort((a, b) => a - b);
  const rows = bounds.map(({ le, s }, i) => {
    const below = i ? new Map(bounds[i - 1].s.times.map((t, k) => [t, bounds[i - 1].s.values[k] ?? 0])) : new Map();
    const own = new Map(s.times.map((t, k) => [t, s.values[k] ?? 0]));
    return { le, counts: times.map((t) => Math.max(0, (own.get(t) ?? 0) - (below.get(t) ?? 0))) };
  });
  const most = Math.max(1e-9, ...rows.flatMap((row) => row.counts));
  const used = rows.map((row, i) => (row.counts.some((c) => c > 0.02) ? i : -1)).filter((i) => i >= 0);
  const [first, last] = [Math.max(0, (used[0] ?? 0) - 1), Math.min(rows.length - 1, (used.at(-1) ?? rows.length - 1) + 1)];
  const step = times.length > 1 ? times[1] - times[0] : 1000;
  const builder = new UPlotConfigBuilder('utc');
  builder.addScale({ scaleKey: 'x', isTime: true, orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right,
    range: () => [board.from, board.to] });
  builder.addScale({ scaleKey: 'y', isTime: false, orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Up,
    range: () => [first, last + 1] });
  builder.addAxis({ scaleKey: 'x', isTime: true, placement: AxisPlacement.Bottom, timeZone: 'utc', theme });
  const seconds = getDisplayProcessor({ field: { type: FieldType.number, config: { unit: 's' } }, theme });
  builder.addAxis({ scaleKey: 'y', placement: AxisPlacement.Left, theme,
    values: ((_: any, splits: number[]) =>
      splits.map((i) => {
        const le = rows[i - 1]?.le;
        if (le === undefined || !Number.isInteger(i)) return '';
        const shown = seconds(le);
        return le === Infinity ? '∞' : `${shown.text}${shown.suffix ?? ''}`;
      })) as any });
  builder.addSeries({ scaleKey: 'y', show: true, theme, pathBuilder: () => null, drawStyle: 'points' as any,
    pointsBuilder: () => null } as any);
  builder.addHook('draw', (u: any) => {
    const ratio = window.devicePixelRatio;
    u.ctx.save();
    u.ctx.beginPath();
    u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height); // the first cell begins before the axis does
    u.ctx.clip();
    for (let i = first; i <= last; i++) {
      rows[i].counts.forEach((count, k) => {
        if (count <= 0.02) return;
        const share = Math.sqrt(count / most);
        const [left, right] = [u.valToPos(times[k] - step, 'x', true), u.valToPos(times[k], 'x', true)];
        const [top, bottom] = [u.valToPos(i + 1, 'y', true), u.valToPos(i, 'y', true)];
        u.ctx.fillStyle = `hsl(${240 - 240 * share}, 80%, ${30 + 25 * share}%)`;
        u.ctx.fillRect(left + ratio / 2, top + ratio / 2, right - left - ratio, bottom - top - ratio);
      });
    }
    u.ctx.restore();
  });
  return (
    <UPlotChart config={builder} data={[times, times.map(() => first)] as any} width={width} height={height}>
      {null}
    </UPlotChart>
  );
}

function Shown({ panel, unit }: { panel: Panel; unit: number }) {
  const { x, y, w, h } = panel.gridPos;
  const [width, height] = [w * unit - GAP, h * CELL - GAP];
  const place: React.CSSProperties = { position: 'absolute', left: x * unit + GAP, top: y * CELL + GAP + 40 };
  if (panel.type === 'row') {
    return <div style={{ ...place, color: theme.colors.text.primary, fontSize: 15, paddingTop: 4 }}>{panel.title}</div>;
  }
  const Kind = { timeseries: Lines, stat: Number_, heatmap: Cells, bargauge: Bars }[panel.type]!;
  return (
    <div style={place}>
      <PanelChrome title={panel.title} width={width} height={height}>
        {(innerWidth, innerHeight) => <Kind panel={panel} width={innerWidth} height={innerHeight} />}
      </PanelChrome>
    </div>
  );
}

const width = window.innerWidth;
const unit = (width - GAP) / 24;
const rows = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
document.body.style.cssText = `margin:0;background:${theme.colors.background.canvas};font-family:sans-serif;font-size:14px`;
const root = document.getElementById('root')!;
root.style.cssText = `position:relative;height:${rows * CELL + 60}px;color:${theme.colors.text.primary}`;
const style = document.createElement('style');
style.textContent = 'button { color: inherit; background: none; border: 0; padding: 0; font-size: 12px }';
document.head.append(style);
createRoot(root).render(
  <ThemeContext.Provider value={theme}>
    <div style={{ position: 'absolute', left: GAP, top: GAP, fontSize: 20 }}>{board.title}</div>
    {board.panels.map((panel, index) => (
      <Shown key={index} panel={panel} unit={unit} />
    ))}
  </ThemeContext.Provider>
);
setTimeout(() => ((window as any).READY = true), 3000);
